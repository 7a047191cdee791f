import bz2
import gzip
import io
import lzma
import os
import re
import socket
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from performer_lm.data.reading import PACKINGS, read_bytes, without_packing

TEXT = "".join(f"line {number * 7919 % 1009} \N{SNOWMAN}\n" for number in range(3000)).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda text: pyarrow.Codec("zstd").compress(text, asbytes=True),
    ".lz4": lambda text: pyarrow.Codec("lz4").compress(text, asbytes=True),
}


def tar(layout: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as archive:
        member = tarfile.TarInfo("a/b.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return file.getvalue()


def old_tar() -> bytes:
    """Return a tar of the kind before POSIX, which has no magic bytes."""
    header = bytearray(tar(tarfile.USTAR_FORMAT))
    header[257:265] = bytes(8)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return file.getvalue()


ARCHIVES = {
    "pax": (tar(tarfile.PAX_FORMAT), "tar"),
    "gnu": (tar(tarfile.GNU_FORMAT), "tar"),
    "old": (old_tar(), "tar"),
    "zip": (zipped(), "zip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(600), "7z"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(600), "rar"),
}


def refusal(path: Path, content: bytes | None = None) -> str:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_bytes(path)
    assert "\n" not in str(caught.value)
    assert "data.errors" not in str(caught.value)
    return str(caught.value)


def test_every_way_to_pack_is_tried() -> None:
    assert set(PACK) == {packing.ending for packing in PACKINGS}


@pytest.mark.parametrize("ending", PACK)
def test_what_a_file_holds_is_told_by_its_bytes_whatever_its_name(tmp_path: Path, ending: str) -> None:
    pack = PACK[ending]
    for name in (f"a.txt{ending}", f"a{ending.upper()}", "a.txt"):
        for text in (TEXT, b"", TEXT[:1]):
            (tmp_path / name).write_bytes(pack(text))
            assert read_bytes(tmp_path / name) == text
        (tmp_path / name).write_bytes(pack(TEXT[:100]) + pack(TEXT[100:]))  # several in a row
        assert read_bytes(tmp_path / name) == TEXT
    (tmp_path / f"b{ending}").write_bytes(b"")
    assert read_bytes(tmp_path / f"b{ending}") == b""
    assert "its first bytes do not" in refusal(tmp_path / f"b{ending}", TEXT)


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("ending", ["", *PACK])
def test_archives_are_refused_whatever_their_names_and_however_they_are_packed(
    tmp_path: Path, name: str, ending: str
) -> None:
    content, kind = ARCHIVES[name]
    packed = PACK[ending](content) if ending else content
    for path in (tmp_path / f"a.{kind}{ending}", tmp_path / "a.txt", tmp_path / f"a{ending}"):
        assert refusal(path, packed) == f"{path} is a {kind} archive: unpack it first"


def test_text_that_begins_like_an_archive_is_text(tmp_path: Path) -> None:
    for text in (b"PK and so on", b"BZh9 is no more", b"Rar! " * 200, b"ustar " * 200, b"\0" * 600, b"0" * 512):
        (tmp_path / "a.txt").write_bytes(text)
        assert read_bytes(tmp_path / "a.txt") == text


@pytest.mark.parametrize("ending", PACK)
def test_damage_is_told_with_the_file_and_its_place(tmp_path: Path, ending: str) -> None:
    packed = PACK[ending](TEXT)
    path = tmp_path / f"a.txt{ending}"
    for content in (packed[: len(packed) // 2], packed[:-1]):
        assert re.search(r"cannot be read: its \w+ data are damaged near byte [\d,]+ of", refusal(path, content))
    assert "packed twice" in refusal(path, PACK[ending](packed))
    if ending in (".gz", ".bz2", ".xz"):  # the others keep a checksum where the packer was asked for it
        for place in range(20, len(packed), len(packed) // 7):
            flipped = bytearray(packed)
            flipped[place] ^= 4
            assert "are damaged near byte" in refusal(path, bytes(flipped))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(tmp_path / "socket"))
    for path, kind in {
        tmp_path / "pipe": "a named pipe",
        tmp_path / "socket": "a socket",
        tmp_path: "a folder",
        Path("/dev/zero"): "a device",
    }.items():
        assert refusal(path) == f"{path} is {kind}; only regular files are read"
    (tmp_path / "link").symlink_to("/dev/zero")
    assert "is a device" in refusal(tmp_path / "link")
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'} cannot be read: No such file or directory"


def test_a_name_is_known_without_its_packing() -> None:
    names = {"a.TXT.GZ": "a.txt", "a.jsonl.zst": "a.jsonl", "a.gz.b": "a.gz.b", "A": "a", ".gz": ""}
    assert {name: without_packing(name) for name in names} == names
