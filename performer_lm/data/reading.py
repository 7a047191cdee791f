"""Local files opened to read: regular files only, unpacked where they are packed, and no archives.

What a file holds is told by its first bytes, whatever its name.
"""

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

HEAD: Final = 512  # bytes that tell: a tar header
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")

KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
BZIP2: Final = tuple(b"BZh%d%s" % (n, first) for n in range(1, 10) for first in (b"1AY&SY", b"\x17rE8P\x90"))
ARCHIVES: Final[Mapping[bytes, str]] = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",  # an empty one
    b"PK\x07\x08": "zip",  # one in several parts
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
}


class Packing(NamedTuple):
    """A way to pack files: the ending of their names, their first bytes, and the function that unpacks them."""

    name: str
    ending: str
    magic: tuple[bytes, ...]
    unpack: Callable[[Any], Any]


def _by_arrow(codec: str) -> Callable[[Any], Any]:
    def unpack(file: Any) -> Any:
        import pyarrow  # comes with datasets

        return pyarrow.CompressedInputStream(file, codec)

    return unpack


PACKINGS: Final = (
    Packing("gzip", ".gz", (b"\x1f\x8b",), lambda file: gzip.GzipFile(fileobj=file)),
    Packing("bzip2", ".bz2", BZIP2, bz2.BZ2File),
    Packing("xz", ".xz", (b"\xfd7zXZ\x00",), lzma.LZMAFile),
    Packing("zstd", ".zst", (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"), _by_arrow("zstd")),
    Packing("lz4", ".lz4", (b"\x04\x22\x4d\x18",), _by_arrow("lz4")),
)
ENDINGS: Final = {packing.ending: packing for packing in PACKINGS}


def without_packing(name: str) -> str:
    """Return a file's name in lower case, without the ending that says how it is packed."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def check_regular(path: Path) -> None:
    """Raise ValueError for all but regular files, without opening them: a pipe may hang, a device never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {KINDS.get(stat.S_IFMT(mode), 'no file')}; only regular files are read")


@contextmanager
def open_unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file to read the bytes it holds, unpacked.

    Raises:
        ValueError: in one line that names the file, where it cannot be read to its end.
    """
    check_regular(path)
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(HEAD)
            file.seek(0)
            _refuse_archive(head, path)
            packing = _packing_of(head)
            if packing is None:
                _check_ending(head, path)
                yield io.BufferedReader(file)
                return
            try:
                yield _unpacked(file, packing, path)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise ValueError(
                    f"{path} cannot be read: its {packing.name} data are damaged near byte {file.tell():,} of "
                    f"{path.stat().st_size:,} ({error})"
                ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def read_bytes(path: Path) -> bytes:
    """Return the bytes that a file holds, unpacked, or raise ValueError that names it."""
    with open_unpacked(path) as file:
        return file.read()


def refuse_utf16(text: bytes, place: str) -> None:
    """Raise ValueError for a text that begins with a mark of UTF-16."""
    if text.startswith(UTF16_MARKS):
        raise ValueError(f"{place} is UTF-16 text; convert it to UTF-8")


def _unpacked(file: io.FileIO, packing: Packing, path: Path) -> io.BufferedReader:
    unpacked = io.BufferedReader(packing.unpack(file))
    head = unpacked.peek(HEAD)[:HEAD]
    _refuse_archive(head, path)
    if inner := _packing_of(head):
        raise ValueError(f"{path} is packed twice, {inner.name} in {packing.name}: unpack it first")
    return unpacked


def _packing_of(head: bytes) -> Packing | None:
    return next((packing for packing in PACKINGS if head.startswith(packing.magic)), None)


def _check_ending(head: bytes, path: Path) -> None:
    if head and (named := ENDINGS.get(path.suffix.lower())):
        raise ValueError(f"{path} cannot be read: its name says {named.name}, and its first bytes do not")


def _refuse_archive(head: bytes, path: Path) -> None:
    kind = next((kind for magic, kind in ARCHIVES.items() if head.startswith(magic)), None)
    if kind or _is_tar(head):
        raise ValueError(f"{path} is a {kind or 'tar'} archive: unpack it first")


def _is_tar(head: bytes) -> bool:
    """Return True for a tar header, which is known by its checksum: not all kinds have magic bytes."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True
