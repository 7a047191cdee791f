"""No file is read further than it is whole, and none grows as it is read."""

import io
import pickle
import shutil
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pytest
import torch
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.checkpoint import reading

Put = Callable[..., Path]
Refused = Callable[..., None]
Content = dict[str, Any]
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a copy of a checkpoint that is whole."""
    return Path(shutil.copy(GOLDEN / "backends" / "exact.ckpt", tmp_path / "a.ckpt"))


def records(path: Path) -> Iterator[tuple[ZipInfo, bytes]]:
    with ZipFile(path) as archive:
        yield from [(info, archive.read(info)) for info in archive.infolist()]


def written_again(path: Path, change: Callable[[ZipInfo], None], **more: bytes) -> None:
    """Write a file again by Python's own writer, with its records' names or compression changed."""
    found = list(records(path))
    with ZipFile(path, "w") as archive:
        for info, data in found:
            change(info)
            archive.writestr(info, data)
        for name, data in more.items():
            archive.writestr(f"archive/{name}", data)


def compressed(info: ZipInfo) -> None:
    info.compress_type = ZIP_DEFLATED


def misnamed(suffix: str, name: str) -> Callable[[ZipInfo], None]:
    def change(info: ZipInfo) -> None:
        if info.filename.endswith(suffix):
            info.filename = name

    return change


def test_any_writer_of_zip_files_will_do(path: Path) -> None:
    wanted = checkpoint.read(path).weights
    written_again(path, lambda info: None)
    assert all(torch.equal(value, wanted[name]) for name, value in checkpoint.read(path).weights.items())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compressed, "it holds the record archive/data.pkl, which is not stored as it is"),
        (misnamed("data/3", "archive/../data/3"), "it holds a record called 'archive/../data/3'"),
        (misnamed("data/3", "elsewhere/data/3"), "it holds a record called 'elsewhere/data/3'"),
        (misnamed("data/3", "archive\\data\\3"), "it holds a record called "),
        (misnamed("data/3", "archive/data/2"), "it holds two records of one name"),
        (misnamed("data/3", "archive/DATA/2"), "it holds two records of one name"),
        (misnamed("byteorder", "archive/constants.pkl"), "it is a program of TorchScript"),
        (misnamed("data.pkl", "archive/data.pickle"), "or is cut short"),
    ],
)
def test_records_are_plain_and_their_names_are(
    change: Callable[[ZipInfo], None], message: str, path: Path, refused: Refused
) -> None:
    written_again(path, change)
    refused(path, message.replace("\\", "\\\\"))


def test_nothing_unpacks_to_more_than_the_file(path: Path, refused: Refused) -> None:
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/data/0", bytes(1 << 26))
    assert path.stat().st_size < 1 << 17
    refused(path, "which is not stored as it is")


CENTRAL, END, LONG_END = b"PK\1\2", b"PK\5\6", b"PK\6\6"


def field(signature: bytes, offset: int, value: bytes, *, everywhere: bool = False) -> Callable[[bytearray], None]:
    """Return a function that sets bytes so far behind a signature, the last one or all of them."""

    def patch(data: bytearray) -> None:
        at = len(data)
        while (at := data.rfind(signature, 0, at)) >= 0:
            data[at + offset : at + offset + len(value)] = value
            if not everywhere:
                return

    return patch


def moved(data: bytearray, at: int, more: bytes) -> None:
    data[at:at] = more


MISSING = "its table of records is missing"
STORED, TWO_WAYS = "which is not stored as it is", "a table of records that can be read in two ways"
PATCHES: dict[str, tuple[Callable[[bytearray], Any], str]] = {
    "encrypted": (field(CENTRAL, 8, b"\1\0"), STORED),
    "larger": (field(CENTRAL, 24, b"\xff\xff\xff\x7f"), STORED),
    "smaller": (field(CENTRAL, 20, b"\1\0\0\0"), STORED),
    "one in another": (field(CENTRAL, 20, 2 * b"\0\x80\0\0", everywhere=True), "records that are larger than the file"),
    "moved table": (field(END, 16, b"\0\0\0\0"), TWO_WAYS),
    "longer table": (field(END, 12, b"\1\0\0\0"), TWO_WAYS),
    "moved long table": (field(LONG_END, 48, b"\1"), TWO_WAYS),
    "something before": (lambda data: moved(data, 0, b"PK\3\4" + bytes(60)), TWO_WAYS),
    "something between": (lambda data: moved(data, data.rindex(LONG_END), bytes(60)), TWO_WAYS),
    "two tables": (lambda data: data.extend(data[data.index(CENTRAL) :]), TWO_WAYS),
    "something after": (lambda data: data.extend(b"more"), "its table of records is missing"),
    "a comment": (
        lambda data: (field(END, 20, b"\4\0")(data), data.extend(b"more")),
        "its table of records is missing",
    ),
    "no zip": (field(b"PK\3\4", 0, b"PKxx", everywhere=True), r"it is no zip file\)"),
    "zeros": (lambda data: data.__setitem__(slice(4, None), bytes(len(data) - 4)), MISSING),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_file_is_as_large_as_its_records_and_means_one_thing(name: str, path: Path, refused: Refused) -> None:
    data = bytearray(path.read_bytes())
    patch, message = PATCHES[name]
    patch(data)
    path.write_bytes(data)
    refused(path, message)


def test_records_and_plain_data_are_bounded(path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (
        ("MOST_RECORDS", "records; at most 50 are read"),
        ("MOST_PLAIN", "bytes of plain data; at most"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(reading, name, 50)
            refused(path, message)


def old_format(path: Path, content: Content) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def pickled(path: Path, content: Content) -> None:
    path.write_bytes(pickle.dumps(content["performer_lm"]))


def in_tar(path: Path, content: Content) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


@pytest.mark.parametrize("write", [old_format, pickled, in_tar])
def test_only_zip_files_are_read(
    write: Callable[[Path, Content], None], content: Content, tmp_path: Path, refused: Refused
) -> None:
    write(tmp_path / "a.ckpt", content)
    refused(tmp_path / "a.ckpt", r"is not a checkpoint of performer_lm, or is cut short \(it is no zip file\)")


def endless() -> Any:
    found: list[Any] = []
    found.append([found])
    return found


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = {"a": found}
    return found


def doubled() -> Any:
    found: Any = []
    for _ in range(40):
        found = [found, found]
    return found


class Ordered(OrderedDict[str, Any]):
    """An ordered dict that is pickled as one of Python's own, with attributes."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"items": 1}


def under(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def deeper_where_it_stands_again() -> Any:
    shared = nested(40)
    return [shared, under(shared, 30)]


MORE_NUMBERS = "that shows more numbers than it stores"
VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "endless": (endless, "it holds data that hold themselves"),
    "nested": (lambda: nested(70), r"nested too deeply \(more than 64 levels\)"),
    "nested by sharing": (deeper_where_it_stands_again, "nested too deeply"),
    "doubled": (doubled, "it holds more than 8,388,608 objects"),
    "attributes": (Ordered, "it holds a dict with attributes of its own"),
    "a function": (lambda: torch._utils._rebuild_tensor_v2, "it holds a function, and only plain data"),
    "one number shown often": (lambda: torch.zeros(1).expand(10**6), MORE_NUMBERS),
    "rows that overlap": (lambda: torch.zeros(8).as_strided((3, 4), (2, 1)), MORE_NUMBERS),
    "columns that overlap": (lambda: torch.zeros(8).as_strided((2, 2), (3, 3)), MORE_NUMBERS),
    "negated": (lambda: torch._neg_view(torch.zeros(2)), "it holds a tensor of torch.float32 on cpu"),
    "many views": (lambda: [row[:-1] for row in torch.zeros(1, 10**5).expand(40, -1)], MORE_NUMBERS),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_read_is_what_it_seems(name: str, content: Content, refused: Refused) -> None:
    make, message = VALUES[name]
    start = time.monotonic()
    refused({**content, "more": make()}, message)
    assert time.monotonic() - start < 10


def test_a_vocabulary_that_is_one_row_repeated_is_refused(content: Content, refused: Refused) -> None:
    content["performer_lm"]["model"]["vocab_size"] = 10**6
    for name in ("embedding", "head"):
        content["state_dict"][f"model.{name}.weight"] = torch.zeros(1, 16).expand(10**6, -1)
    refused(content, r"it holds a tensor of shape \(1000000, 16\) that shows more numbers than it stores")


def test_layouts_of_ones_own_are_kept(content: Content, tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    more: list[Tensor] = [shared, shared.mT, shared[::2], shared[:, 1:3], torch.zeros(0, 5), torch.randn(2, 1, 3).mT]
    checkpoint.save({**content, "more": more}, tmp_path / "a.ckpt")
    for one, other in zip(more, checkpoint.read(tmp_path / "a.ckpt").content["more"], strict=True):
        assert torch.equal(one, other)
