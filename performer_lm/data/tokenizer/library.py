"""Any `tokenizer.json` of the `tokenizers` library, as a table of byte pieces.

The bytes that an id stands for are read off its decoder: bytes spelled by visible characters (GPT-2's way), byte
tokens such as <0x0A>, or else what the id adds to the text that the decoder gives. Such a tokenizer may lose text (a
normaliser that lowers case, words without their spaces) or add to it (a space before the first word); who counts
bits per byte compares `byte_lengths` with the text.
"""

import json
import re
import struct
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final, final

import numpy as np
import tokenizers

from performer_lm.data.tokenizer.base import MOST_IDS, Ids, Text, Tokenizer
from performer_lm.data.tokenizer.byte_level import encode_in_runs, unspell
from performer_lm.data.tokenizer.utf8 import as_str
from performer_lm.wording import first_line, short

LONGEST_TOKEN: Final = 1 << 12  # characters of a token, or of what a file adds to a text
MOST_GROWTH: Final = 1 << 12  # times that a file may lengthen a text by replacing parts of it
DECODED_AT_ONCE: Final = 1 << 12  # tokens

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@final
class LibraryTokenizer(Tokenizer):
    """A tokenizer that somebody trained; its own special tokens stay in the table and no text spells them.

    Args:
        content: a parsed `tokenizer.json`; ValueError, in one line, where the library does not take it.
        specials: names of further special tokens; theirs are the ids after the file's own and the end's.
        size: ids of the table, where a model has room for more than the file names.
        end_ids: of the file's own ids, those that end a text; none: the end is an id after them.
        begin_id: of the file's own ids, the one that stands before a text to be continued.
    """

    def __init__(
        self,
        *,
        content: Mapping[str, Any],
        specials: Sequence[str] = (),
        size: int | None = None,
        end_ids: Sequence[int] = (),
        begin_id: int | None = None,
    ) -> None:
        self._content = dict(content)
        self._options = {"size": size, "end_ids": list(end_ids), "begin_id": begin_id}
        with _library_errors():
            for name in ("normalizer", "decoder"):
                _check_growth(name, self._content.get(name))
            self._library = tokenizers.Tokenizer.from_str(json.dumps(_settled(self._content)))
            self._library.encode_special_tokens = True  # a text that spells one is a text
            pieces = _padded(_pieces(self._library, self._content), size)
        marks = [*end_ids, *([] if begin_id is None else [begin_id])]
        if wrong := next((token for token in marks if not 0 <= token < len(pieces)), None):
            raise ValueError(f"tokenizer.json: it has {len(pieces):,} ids, and none is {wrong}")
        for token in marks:
            pieces[token] = b""
        super().__init__(pieces, specials=specials, end_ids=end_ids, begin_id=begin_id)

    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        strings = [as_str(text) for text in texts]
        with _library_errors():
            encoded = encode_in_runs(self._library, strings)
        if any(bool((ids >= self.num_pieces).any()) for ids in encoded):
            raise ValueError("tokenizer.json: it gives ids that are not in its vocabulary")
        return encoded

    def encode_marked(self, text: str) -> Ids:
        with _library_errors():
            return np.array(self._marking.encode(as_str(text), add_special_tokens=False).ids, dtype=np.int64)

    @cached_property
    def _marking(self) -> Any:
        """The same tokenizer, for which a text that spells a special token is that token."""
        return tokenizers.Tokenizer.from_str(json.dumps(_settled(self._content)))

    def _plain(self) -> dict[str, Any]:
        options = {name: value for name, value in self._options.items() if value not in (None, [])}
        return {"kind": "tokenizer_json", "content": self._content, **options}


def read_library(plain: dict[str, Any], *, specials: Sequence[str]) -> LibraryTokenizer:
    """Build the tokenizer that plain data describes, or raise ValueError in one line."""
    content = plain.get("content")
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer data: content ({short(content)}) must be a parsed tokenizer.json")
    options = {name: plain[name] for name in ("size", "end_ids", "begin_id") if name in plain}
    for name, value in options.items():
        numbers = value if isinstance(value, list) and name == "end_ids" else [value]
        if not all(type(number) is int and 0 <= number <= MOST_IDS for number in numbers):
            raise ValueError(f"tokenizer data: {name} ({short(value)}) must be whole numbers up to {MOST_IDS:,}")
    if not isinstance(options.get("end_ids", []), list):
        raise ValueError(f"tokenizer data: end_ids ({short(options['end_ids'])}) must be a list")
    return LibraryTokenizer(content=content, specials=specials, **options)


def _settled(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content without options that make encoding random, shorten it or add to it."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"tokenizer.json: model ({short(model)}) must be a section")
    return {**content, "truncation": None, "padding": None, "post_processor": None, "model": {**model, "dropout": None}}


def _pieces(library: Any, content: dict[str, Any]) -> list[bytes]:
    """Return the bytes of text that each id of the library's vocabulary stands for."""
    vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise ValueError("tokenizer.json: it has no tokens")
    size = max(vocabulary.values()) + 1
    if size > 2 * len(vocabulary) + 1024:
        raise ValueError(f"tokenizer.json: ids reach {size - 1}, with only {len(vocabulary)} tokens")
    added = library.get_added_tokens_decoder()
    spells_bytes = any(part.get("type") == "ByteLevel" for part in _parts(content.get("decoder")))
    if longest := next((name for name in vocabulary if len(name) > LONGEST_TOKEN), None):
        raise ValueError(f"tokenizer.json: a token of {len(longest):,} characters; at most {LONGEST_TOKEN:,} are read")
    names = {token: name for name, token in vocabulary.items() if token not in added}
    unknown = content["model"].get("unk_token")
    ordinary = [token for token, name in names.items() if name != unknown]
    spoken = {} if spells_bytes else _spoken(library, ordinary)
    pieces = [b""] * size
    for token in ordinary:
        if spells_bytes:
            pieces[token] = unspell(names[token]) or names[token].encode("utf-8", errors="replace")
        elif found := _BYTE_TOKEN.fullmatch(names[token]):
            pieces[token] = bytes([int(found[1], 16)])
        else:
            pieces[token] = spoken[token]
    for token, entry in added.items():
        if not entry.special:
            pieces[token] = entry.content.encode("utf-8")
    return pieces


def _padded(pieces: list[bytes], size: int | None) -> list[bytes]:
    """Return the table with room for `size` ids; those that the file does not name stand for nothing."""
    if size is not None and size < len(pieces):
        raise ValueError(f"tokenizer.json: it has {len(pieces):,} ids, and there is room for {size:,}")
    return pieces + [b""] * ((size or 0) - len(pieces))


def _spoken(library: Any, tokens: list[int]) -> dict[int, bytes]:
    """Return the text that each token adds to the decoded text of the token before it."""
    if not tokens:
        return {}
    anchor = tokens[0]
    before = library.decode([anchor])
    found: dict[int, bytes] = {}
    for first in range(0, len(tokens), DECODED_AT_ONCE):
        group = tokens[first : first + DECODED_AT_ONCE]
        for token, text in zip(group, library.decode_batch([[anchor, token] for token in group]), strict=True):
            found[token] = text.removeprefix(before).encode("utf-8", errors="replace")
    return found


def _check_growth(name: str, section: Any) -> None:
    """Refuse a normaliser or decoder that could lengthen a text without measure: each replacement may double it."""
    growth = 1.0
    for part in _parts(section):
        added = [value for key in ("content", "prepend") if isinstance(value := part.get(key), str)]
        growth *= max(1.0, _growth_of(part))
        if growth > MOST_GROWTH or any(len(text) > LONGEST_TOKEN for text in added):
            raise ValueError(f"tokenizer.json: its {name} may make a text over {MOST_GROWTH:,} times as long")


def _growth_of(part: dict[str, Any]) -> float:
    """Return how many characters may come of one, by a single part."""
    content, pattern, table = part.get("content"), part.get("pattern"), part.get("precompiled_charsmap")
    if isinstance(table, str):
        packed = b64decode(table)  # the size of a trie, the trie, and replacements that end in a zero
        (size,) = struct.unpack_from("<I", packed)
        return max(map(len, packed[4 + size :].split(b"\0")))
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0
    replaced = pattern.get("String")
    return len(content) / len(replaced) if isinstance(replaced, str) and replaced else 1 + len(content)


def _parts(section: Any) -> Iterator[dict[str, Any]]:
    """Yield the sections within a section of a tokenizer.json."""
    if isinstance(section, dict):
        yield section
    for item in section.values() if isinstance(section, dict) else section if isinstance(section, list) else ():
        yield from _parts(item)


@contextmanager
def _library_errors() -> Iterator[None]:
    """Turn errors of the library into one line; a panic of its Rust side is no Exception to Python."""
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tokenizer.json: {short(first_line(error))}") from None
