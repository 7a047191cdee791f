"""Texts as tokenizers take them: a string, or bytes that may or may not be UTF-8."""

import re
from collections.abc import Iterator
from typing import Final

from performer_lm.data.tokenizer.base import Text

LONGEST_PART: Final = 1 << 16  # characters encoded as one; a longer text is cut at a line

_ESCAPED: Final = re.compile("([\udc80-\udcff]+)")  # how Python spells bytes that are not UTF-8


def as_bytes(text: Text) -> bytes:
    """Return a text's bytes, or raise ValueError for a string with a lone surrogate."""
    try:
        return text if isinstance(text, bytes) else text.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = error.object[error.start]
        raise ValueError(f"text cannot be written as UTF-8: {broken!a} at character {error.start}") from None


def as_str(text: Text) -> str:
    """Return a text's characters, or raise ValueError for a lone surrogate or bytes that are not UTF-8."""
    try:
        return as_bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None


def escaped(text: Text) -> str:
    """Return a text's characters, with each byte 0x80..0xff that is not UTF-8 as U+DC80..U+DCFF."""
    return as_bytes(text).decode("utf-8", errors="surrogateescape")


def runs(text: Text) -> Iterator[Text]:
    """Split a text into parts of bounded length: strings, and between them the bytes that are not UTF-8."""
    for index, run in enumerate(_ESCAPED.split(escaped(text))):
        if index % 2:
            yield run.encode("utf-8", errors="surrogateescape")
        else:
            yield from parts(run)


def parts(text: str) -> Iterator[str]:
    """Cut a text into parts of bounded length, after a line where there is one."""
    start = 0
    while len(text) - start > LONGEST_PART:
        line = text.rfind("\n", start, start + LONGEST_PART)
        end = line + 1 if line >= 0 else start + LONGEST_PART
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
