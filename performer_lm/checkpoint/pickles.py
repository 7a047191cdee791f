"""The pickle inside a checkpoint, gone through operation by operation before any of them is run.

`torch.load(weights_only=True)` runs no code, but makes whatever it is told to: a byte array of any length, keys whose
hashes take for ever. So a pickle is first run on a stack of sizes alone. It may make dicts, lists, tuples, numbers,
strings and dense tensors, at most `MOST_OBJECTS` of them, those that are shared counted at each place.
"""

import pickletools
from itertools import takewhile
from typing import Any, Final, NamedTuple

MOST_OBJECTS: Final = 1 << 23
TOO_MANY: Final = f"it holds more than {MOST_OBJECTS:,} objects, those that are shared counted where they stand"
MOST_BITS: Final = 63  # of a whole number: what a tensor can hold; longer ones can be given equal hashes

KINDS: Final = ("Half", "BFloat16", "Float", "Double", "Char", "Short", "Int", "Long", "Byte", "Bool")
STORAGES: Final = frozenset(f"torch {kind}Storage" for kind in KINDS)
ORDERED: Final = "collections OrderedDict"
CALLED: Final = frozenset((ORDERED, "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size"))

_CONSTANTS: Final = {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"}
_VALUES: Final = {*_CONSTANTS, "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_PUTS: Final = {"BINPUT", "LONG_BINPUT"}
_GETS: Final = {"BINGET", "LONG_BINGET"}
_MADE: Final = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "REDUCE", "BUILD"}
_OPERATIONS: Final = {opcode.name: opcode for opcode in pickletools.opcodes}
_BELOW: Final = {  # how much an operation takes of what stands below its mark, or in all where it needs no mark
    name: len([*takewhile(lambda slot: slot is not pickletools.markobject, _OPERATIONS[name].stack_before)])
    for name in (*_MADE, "BINPERSID")
}
_TO_MARK: Final = {name for name in _MADE if pickletools.markobject in _OPERATIONS[name].stack_before}


class Foreign(ValueError):
    """The reason why a file is no checkpoint of ours, in one line."""


class _Item(NamedTuple):
    """A value's place on the stack."""

    size: int  # objects that are met by whoever goes through the value
    name: str = ""  # of a global


_ONE: Final = _Item(1)
_DICT: Final = "an ordered dict"


def check_pickle(data: bytes) -> None:
    """Refuse a pickle that would make anything but plain data and dense tensors, or too much of it.

    Raises:
        Foreign: in one line.
        ValueError, IndexError, KeyError: for a pickle that is broken.
    """
    stack: list[_Item] = []
    marks: list[list[_Item]] = []
    memo: dict[int, _Item] = {}
    met = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        met += 1
        if name in _PUTS:
            memo[argument] = stack[-1]
        elif name in _VALUES:
            if name == "LONG1" and argument.bit_length() > MOST_BITS:
                raise Foreign(f"it holds a whole number of {argument.bit_length()} bits")
            stack.append(_ONE)
        elif name in _GETS:
            stack.append(memo[argument])
            met += stack[-1].size
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name == "GLOBAL":
            if argument not in CALLED and argument not in STORAGES:
                found = argument[:60].replace(" ", ".")
                raise Foreign(f"it holds {found!a}, and only plain data and dense tensors are read")
            stack.append(_Item(1, argument))
        elif name in _BELOW:
            inside: list[_Item] = []
            if name in _TO_MARK:
                inside, stack = stack, marks.pop()
            below = len(stack) - _BELOW[name]
            if below < 0:
                raise IndexError("the stack is empty")
            stack[below:] = [_make(name, [*stack[below:], *inside])]
        elif name not in ("PROTO", "STOP") or (name == "PROTO" and argument != 2):
            raise Foreign(f"it is pickled with {name}, which no checkpoint needs")
        if met > MOST_OBJECTS:
            raise Foreign(TOO_MANY)


def _make(name: str, taken: list[_Item]) -> _Item:
    """Return the result of an operation on the items that it takes."""
    kept = ""
    if name in ("SETITEM", "SETITEMS"):
        kept = taken[0].name
        if any(key.size > 1 for key in taken[1::2]):
            raise Foreign("it holds a dict whose keys are neither names nor numbers")
    elif name == "REDUCE":
        called, arguments = taken
        if called.name not in CALLED or (called.name == ORDERED and arguments.size > 1):
            raise Foreign(f"it calls {called.name.replace(' ', '.') or 'what is no function'}")
        kept = _DICT if called.name == ORDERED else ""
    elif name == "BUILD":
        kept = taken[0].name
        if kept != _DICT:
            raise Foreign("it sets attributes of what is no ordered dict")
    elif name == "BINPERSID" and taken[0].size > 6:
        raise Foreign("it names a storage by more than its kind, key, place and size")
    return _Item(1 + sum([item.size for item in taken]), kept)
