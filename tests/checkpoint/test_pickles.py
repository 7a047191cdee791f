"""No pickle makes more than it holds, or anything but plain data and dense tensors."""

import _codecs
import pickle
import pickletools
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from performer_lm import checkpoint
from performer_lm.checkpoint import pickles
from performer_lm.checkpoint.pickles import Foreign, check_pickle

Put = Callable[..., Path]
Refused = Callable[..., None]


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def spelled(*operations: tuple[str, bytes] | str) -> bytes:
    """Return a pickle from the names of operations, and what follows their codes."""
    codes = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    parts = [(each, b"") if isinstance(each, str) else each for each in operations]
    return b"\x80\x02" + b"".join(codes[name] + more for name, more in parts) + b"."


def doubled(made: str, levels: int = 60) -> bytes:
    """Return the pickle of a value that holds the one before twice, level by level."""
    words: list[tuple[str, bytes] | str] = ["EMPTY_TUPLE", ("BINPUT", b"\0")]
    for level in range(levels):
        get, put = ("BINGET", bytes([level])), ("BINPUT", bytes([level + 1]))
        if made == "TUPLE2":
            words += [get, get, "TUPLE2", put]
        elif made == "APPENDS":
            words += ["EMPTY_LIST", put, "MARK", get, get, "APPENDS"]
        else:
            words += ["EMPTY_DICT", put, "NONE", get, "SETITEM", ("BININT1", b"\1"), get, "SETITEM"]
    return spelled(*words)


FOREIGN: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: Call(bytearray, 10**11),
    "Tensor": lambda: Call(torch.Tensor, 10**11),
    "FloatTensor": lambda: Call(torch.FloatTensor, 10**11),
    "encode": lambda: Call(_codecs.encode, "a" * 1000, "idna"),
    "set": lambda: {1},
    "Counter": lambda: Counter("abc"),
    "complex": lambda: 1j,
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float32,
    "bytes": lambda: b"abc",
    "pairs": lambda: Call(OrderedDict, [(1, 2)]),
    "complex numbers": lambda: torch.zeros(2, dtype=torch.complex64),
    "sparse": lambda: torch.zeros(2, 2).to_sparse(),
    "compressed": lambda: torch.ones(2, 2).to_sparse_csr(),
    "meta": lambda: torch.zeros(2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    "float8": lambda: torch.zeros(2, dtype=torch.float8_e5m2),
    "subclass": lambda: nn.Buffer(torch.zeros(2)),
    "numpy": lambda: torch.zeros(2).numpy(),
}


@pytest.mark.filterwarnings("ignore:Sparse (invariant|CSR)", "ignore:.*quantize", "ignore:.*deprecated")
@pytest.mark.parametrize("name", FOREIGN)
def test_only_plain_data_and_dense_tensors_are_made(name: str, content: dict[str, Any], refused: Refused) -> None:
    refused(
        {**content, "more": [FOREIGN[name]()]}, "is not a checkpoint of performer_lm: it (holds|calls|is pickled with) "
    )


def test_tensors_and_plain_data_are_taken(content: dict[str, Any], tmp_path: Path) -> None:
    shared = {"a": (1.5, None, "ä", 1 - 2**63, [True])}
    numbers = [torch.zeros(2, dtype=kind) for kind in (torch.bool, torch.int8, torch.bfloat16, torch.float64)]
    more = [shared, shared, numbers, nn.Parameter(torch.zeros(2)), torch.zeros(2, 3).mT, torch.Size([2])]
    torch.save({**content, "more": more}, tmp_path / "a.ckpt")
    found = checkpoint.read(tmp_path / "a.ckpt").content["more"]
    assert found[0] == shared
    assert not found[3].requires_grad


FORBIDDEN = {
    "long numbers": [("LONG1", b"\x09" + b"\x01" * 9)],
    "longer numbers": [("LONG4", struct.pack("<i", 4) + b"\1" * 4)],
    "bytes": [("BINBYTES", struct.pack("<I", 1) + b"a")],
    "arrays": [("BYTEARRAY8", struct.pack("<Q", 1) + b"a")],
    "text": [("BINUNICODE8", struct.pack("<Q", 1) + b"a")],
    "sets": ["EMPTY_SET"],
    "new objects": [("GLOBAL", b"torch.nn.parameter\nParameter\n"), "EMPTY_TUPLE", "NEWOBJ"],
    "no functions": ["NONE", "EMPTY_TUPLE", "REDUCE"],
    "storages called": [("GLOBAL", b"torch\nFloatStorage\n"), "EMPTY_TUPLE", "REDUCE"],
    "keys of tuples": ["EMPTY_DICT", "NONE", "TUPLE1", "NONE", "SETITEM"],
    "keys among others": ["EMPTY_DICT", "MARK", "NONE", "NONE", "NONE", "TUPLE1", "NONE", "SETITEMS"],
    "attributes of lists": ["EMPTY_LIST", "EMPTY_DICT", "BUILD"],
    "storages named by trees": ["NONE", "TUPLE1", "TUPLE1", "TUPLE1", "TUPLE1", "TUPLE1", "TUPLE1", "BINPERSID"],
    "another protocol": [("PROTO", b"\4"), "NONE"],
    "no opcodes": [("INT", b"1\n")],
    "copies": ["NONE", "DUP", "TUPLE2"],
    "functions": [("GLOBAL", b"os\nsystem\n")],
    "long names": [("GLOBAL", b"a" * 5000 + b"\nb\n")],
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_operation_but_those_of_plain_data_is_run(name: str, put: Put, refused: Refused) -> None:
    refused(put(spelled(*FORBIDDEN[name])), "is not a checkpoint of performer_lm: it ")


BROKEN = [
    ["SETITEM"],
    ["NONE", "APPENDS"],
    [("BINGET", b"\7")],
    ["TUPLE"],
    [("BINPUT", b"\0")],
    [("BINUNICODE", b"\xff")],
]


@pytest.mark.parametrize("operations", BROKEN, ids=range(len(BROKEN)))
def test_broken_pickles_are_one_line(operations: list[Any], put: Put, refused: Refused) -> None:
    refused(put(spelled(*operations)), "is not a checkpoint of performer_lm, or is cut short")


@pytest.mark.parametrize("made", ["TUPLE2", "APPENDS", "SETITEM"])
def test_what_doubles_at_every_level_ends_at_once(made: str, put: Put, refused: Refused) -> None:
    refused(put(doubled(made)), "it holds more than 8,388,608 objects")


def test_what_is_shared_counts_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST_OBJECTS", 10_000)
    shared = tuple(range(100))
    check_pickle(pickle.dumps([shared] * 20, 2))
    for many in ([shared] * 100, list(range(11_000))):
        with pytest.raises(Foreign, match="it holds more than 8,388,608 objects"):
            check_pickle(pickle.dumps(many, 2))
