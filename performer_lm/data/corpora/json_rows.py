"""The text column of JSON files: an object a line, or an array of objects, or objects over several lines.

Only the wanted column is looked at: the others may hold anything, and another thing in every row.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from performer_lm.data.corpora.columns import pick_column
from performer_lm.data.reading import BYTE_ORDER_MARK, open_unpacked, refuse_utf16

NAMES_KEPT: Final = 1000  # of columns, to name the nearest one where the wanted one is missing
ABSENT: Final = object()
TYPES: Final = {bool: "true or false", float: "a number", list: "a list", dict: "an object"}
DECODER: Final = json.JSONDecoder(parse_int=float, strict=False)  # integers of any length, tabs inside strings


def read_json_column(path: Path, column: str) -> Iterator[bytes]:
    """Yield the text of each row; a row without text is empty.

    Raises:
        ValueError: naming the file and the line, or the nearest column where no row has one of that name.
    """
    names: dict[str, None] = {}
    is_there = False
    for place, row in _rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{place} is no JSON object")
        value = _value(row, column)
        is_there = is_there or value is not ABSENT
        if not is_there and len(names) < NAMES_KEPT:
            names |= dict.fromkeys(_names(row))
        if value is ABSENT or value is None:
            yield b""
        elif isinstance(value, str):
            yield _encoded(value)
        else:
            raise ValueError(f"{place}: column '{column}' holds {TYPES[type(value)]}, not text")
    if names and not is_there:
        pick_column(column, list(names), where=str(path))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row with its place, for messages."""
    with open_unpacked(path) as file:
        is_first = True
        for number, line in enumerate(file, 1):
            if number == 1:
                refuse_utf16(line, str(path))
                line = line.removeprefix(BYTE_ORDER_MARK)
            text = _decoded(line).strip()
            if not text:
                continue
            if is_first and (text.startswith("[") or _goes_on(text)):
                yield from _rows_of_document(text + "\n" + _decoded(file.read()), path, first_line=number)
                return
            is_first = False
            row, end = _parse(text, 0, path, line=number)
            if end < len(text):
                raise ValueError(f"{path} line {number} is not JSON: more than one value, at column {end + 1}")
            yield f"{path} line {number}", row


def _rows_of_document(text: str, path: Path, *, first_line: int) -> Iterator[tuple[str, Any]]:
    """Yield the rows of objects, or of arrays of objects, that follow one another over any lines."""
    text, position, number = text.rstrip(), 0, 0
    while position < len(text):
        value, position = _parse(text, position, path, line=first_line)
        for row in value if isinstance(value, list) else [value]:
            yield f"{path} row {number}", row
            number += 1
        while text[position : position + 1].isspace():
            position += 1


def _goes_on(text: str) -> bool:
    """Return True if a value begins in a line, and does not end there."""
    try:
        DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except RecursionError:
        return False
    return False


def _parse(text: str, position: int, path: Path, *, line: int) -> tuple[Any, int]:
    """Return the value that begins at a position of a text, and where it ends; `line` is the text's first line."""
    try:
        return DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        place = f"{path} line {line + error.lineno - 1}"
        raise ValueError(f"{place} is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{path} line {line} is nested too deeply") from None


def _value(row: dict[str, Any], column: str) -> Any:
    """Return the value of a column, or of a field within one."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return ABSENT
        value = value[name]
    return value


def _names(row: dict[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{field}" for field in value)


def _decoded(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _encoded(text: str) -> bytes:
    """Return a text's bytes, those that were not UTF-8 as they were; `data.errors` decides on them."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character, as \ud800
        return text.encode("utf-8", "surrogatepass")
