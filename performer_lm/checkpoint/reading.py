"""Checkpoint files, read without trusting them: bounds on their size, content and structure.

A file is looked at three times, each time before the next could do harm: its table of records, its pickle
(`pickles.py`), and what `torch.load(weights_only=True)` has made of it. What is read is plain data and dense tensors on
the CPU, no larger than the file.

| bound | what it bounds |
|---|---|
| the file's size | its records together, which are not compressed |
| `MOST_RECORDS` | their number |
| `MOST_PLAIN` | bytes of the pickle, which holds everything but the tensors' numbers |
| `MOST_OBJECTS` | objects, each counted at every place where it stands |
| `MOST_BITS` | bits of a whole number |
| `MOST_DEPTH` | objects inside one another |
| `MOST_VIEWS` | bytes of all tensors over the file's size: tied weights share their numbers |
"""

import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import Tensor

from performer_lm.checkpoint.pickles import MOST_OBJECTS, TOO_MANY, Foreign, check_pickle

MOST_RECORDS: Final = 1 << 20
MOST_PLAIN: Final = 1 << 28
MOST_DEPTH: Final = 64
MOST_VIEWS: Final = 8
DTYPES: Final = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
}


def read_content(path: Path, *, mmap: bool) -> Any:
    """Return a file's content, with tensors on the CPU; `mmap` leaves their numbers on disk until they are looked at.

    Raises:
        Foreign: in one line, for content that no checkpoint has.
        Exception: of zip and pickle readers, on broken bytes.
    """
    check_pickle(_read_pickle(path))
    # explicit: the environment (TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD) may turn the default off, but not this
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    _Walk(bytes_stored=path.stat().st_size).check(content)
    return content


def _read_pickle(path: Path) -> bytes:
    """Return the pickle of a zip file whose records are as large as they say, and no larger than the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError("it is no zip file")
        file.seek(max(0, size - 98))
        _check_end(file.read(), size)
        with ZipFile(file) as archive:
            records = archive.infolist()
            _check_records(records, size)
            return archive.read(f"{records[0].filename.partition('/')[0]}/data.pkl")


def _check_end(tail: bytes, size: int) -> None:
    """Refuse a file whose last bytes leave open where its table of records lies: readers would disagree on it.

    The table ends where its end is described: by 22 bytes, or by 56 and 20 more before these, which say the same.
    """
    if len(tail) < 22 or tail[-22:-18] != b"PK\5\6":
        raise ValueError("its table of records is missing")
    *place, comment = struct.unpack("<LLH", tail[-10:])
    end, agrees = size - 22, comment == 0
    if tail[-42:-38] == b"PK\6\7":
        end, long = size - 98, [*struct.unpack("<QQ", tail[-58:-42])]
        agrees = agrees and tail[:4] == b"PK\6\6" and struct.unpack("<Q", tail[-34:-26]) == (end,)
        agrees = agrees and place == [min(number, 0xFFFFFFFF) for number in long]
        place = long
    if not agrees or sum(place) != end:  # its length and its start
        raise Foreign("it has a table of records that can be read in two ways")


def _check_records(records: list[ZipInfo], size: int) -> None:
    """Refuse records that are not plainly named, not stored as they are, or larger than the file."""
    if not 0 < len(records) <= MOST_RECORDS:
        raise Foreign(f"it holds {len(records):,} records; at most {MOST_RECORDS:,} are read")
    if len({record.orig_filename.lower() for record in records}) < len(records):
        raise Foreign("it holds two records of one name")
    folder = records[0].filename.partition("/")[0]
    for record in records:
        name = record.orig_filename
        parts = name.split("/")
        if parts[0] != folder or ".." in parts or not name.isascii() or "\0" in name or "\\" in name:
            raise Foreign(f"it holds a record called {name[:60]!a}")
        if record.compress_type != ZIP_STORED or record.compress_size != record.file_size or record.flag_bits & 1:
            raise Foreign(f"it holds the record {name[:60]}, which is not stored as it is")
        if parts[1:] == ["data.pkl"] and record.file_size > MOST_PLAIN:
            raise Foreign(f"it holds {record.file_size:,} bytes of plain data; at most {MOST_PLAIN:,} are read")
        if parts[1:] == ["constants.pkl"]:
            raise Foreign("it is a program of TorchScript")
    if sum(record.file_size for record in records) > size:
        raise Foreign("it holds records that are larger than the file")


class _Walk:
    """One way through all that a file of `bytes_stored` holds, in which each object is looked at once."""

    def __init__(self, *, bytes_stored: int) -> None:
        self._known: dict[int, tuple[int, int]] = {}  # by identity: objects inside, and how deep they go
        self._left = MOST_VIEWS * bytes_stored  # bytes that further tensors may span

    def check(self, value: Any, *, depth: int = 0) -> tuple[int, int]:
        """Return the number of objects in a value, and their depth, or raise Foreign for one that no checkpoint has."""
        if isinstance(value, Tensor):
            self._check_tensor(value)
            return 1, 1
        if value is None or type(value) in (bool, int, float, str):
            return 1, 1
        if type(value) not in (dict, OrderedDict, list, tuple, torch.Size):
            raise Foreign(f"it holds a {type(value).__name__}, and only plain data and dense tensors are read")
        if depth >= MOST_DEPTH:
            raise Foreign(f"it holds data that are nested too deeply (more than {MOST_DEPTH} levels)")
        if id(value) not in self._known:
            self._known[id(value)] = 0, MOST_DEPTH  # until it is known: what holds itself has no end
            self._known[id(value)] = self._check_items(value, depth=depth)
        objects, levels = self._known[id(value)]
        if depth + levels > MOST_DEPTH:
            raise Foreign("it holds data that hold themselves, or are nested too deeply")
        if objects > MOST_OBJECTS:
            raise Foreign(TOO_MANY)
        return objects, levels

    def _check_items(self, value: Any, *, depth: int) -> tuple[int, int]:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        attributes = vars(value) if isinstance(value, OrderedDict) else {}
        if attributes.keys() - {"_metadata"}:
            raise Foreign("it holds a dict with attributes of its own")
        objects, levels = 1, 0
        for item in (*items, *attributes.values()):
            more, deeper = self.check(item, depth=depth + 1)
            objects, levels = objects + more, max(levels, deeper)
        return objects, levels + 1

    def _check_tensor(self, tensor: Tensor) -> None:
        """Refuse a tensor that is not dense and plain, or stores fewer numbers than it shows."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise Foreign(
                f"it holds a {type(tensor).__name__} of layout {tensor.layout}, and only dense tensors are read"
            )
        if tensor.device.type != "cpu" or tensor.dtype not in DTYPES or tensor.is_neg():
            raise Foreign(f"it holds a tensor of {tensor.dtype} on {tensor.device}, and only plain numbers are read")
        span = tensor.numel() * tensor.element_size()
        self._left -= span
        if span > tensor.untyped_storage().nbytes() or self._left < 0 or _overlaps(tensor):
            raise Foreign(f"it holds a tensor of shape {tuple(tensor.shape)} that shows more numbers than it stores")
        tensor.requires_grad_(False)


def _overlaps(tensor: Tensor) -> bool:
    """Return True if two places of a tensor may be one number of its storage."""
    reach = 0
    for stride, count in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (count - 1)
    return False
