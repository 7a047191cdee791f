"""Tokenizers without words: a token is a byte, or a character."""

from collections.abc import Iterable, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from performer_lm.data.tokenizer.base import Ids, Text, Tokenizer
from performer_lm.data.tokenizer.utf8 import as_bytes, escaped
from performer_lm.wording import short


@final
class ByteTokenizer(Tokenizer):
    """Every byte is a token. Takes any bytes, valid UTF-8 or not."""

    def __init__(self, *, specials: Sequence[str] = ()) -> None:
        super().__init__([bytes([value]) for value in range(256)], specials=specials)

    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        return [np.frombuffer(as_bytes(text), dtype=np.uint8).astype(np.int64) for text in texts]

    def _plain(self) -> dict[str, Any]:
        return {"kind": "bytes"}


@final
class CharacterTokenizer(Tokenizer):
    """Every character of an alphabet is a token.

    Args:
        alphabet: the characters, each once.
        fallback: whether any other character is written as its UTF-8 bytes, which are ids 0..255 then; an ASCII
            character is its byte. Without it, the ids are the alphabet's and other characters are refused.
        specials: names of special tokens.
    """

    def __init__(self, *, alphabet: str, fallback: bool, specials: Sequence[str] = ()) -> None:
        self._alphabet = alphabet
        self._fallback = fallback
        self._ids = np.full(0x110000, -1, dtype=np.int32)  # by code point
        pieces: list[bytes] = []
        if fallback:
            pieces = [bytes([value]) for value in range(256)]
            self._ids[:128] = np.arange(128)
            self._ids[0xDC80:0xDD00] = np.arange(128, 256)  # bytes that are not UTF-8, as `escaped` spells them
        for character in alphabet:
            if self._ids[ord(character)] < 0:
                self._ids[ord(character)] = len(pieces)
                pieces.append(character.encode("utf-8"))
        super().__init__(pieces, specials=specials)

    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: Text) -> Ids:
        points = _code_points(escaped(text))
        ids = self._ids[points].astype(np.int64)
        unknown = ids < 0
        if not unknown.any():
            return ids
        if not self._fallback:
            raise ValueError(_refusal(points[unknown]))
        return _with_bytes(ids, points)

    def _plain(self) -> dict[str, Any]:
        return {"kind": "characters", "alphabet": self._alphabet, "fallback": self._fallback}


def learn_characters(
    texts: Iterable[bytes], *, vocab_size: int | None, fallback: bool, specials: Sequence[str] = ()
) -> CharacterTokenizer:
    """Build a character tokenizer from the characters of texts, sorted.

    Args:
        texts: documents; bytes that are not UTF-8 are left to the fallback.
        vocab_size: ids in all; the most frequent characters get them. None for all characters.
        fallback: whether other characters are written as bytes.
        specials: names of special tokens.
    """
    counts = np.zeros(0x110000, dtype=np.int64)
    for text in texts:
        points, times = np.unique(_code_points(escaped(text)), return_counts=True)
        counts[points] += times
    counts[0xD800:0xE000] = 0
    if fallback:
        counts[:128] = 0  # ASCII characters have their bytes' ids
    found = np.flatnonzero(counts)
    if vocab_size is not None:
        most = max(vocab_size - 1 - len(specials) - 256 * fallback, 0)
        found = np.sort(found[np.argsort(-counts[found], kind="stable")][:most])
    return CharacterTokenizer(alphabet="".join(map(chr, found)), fallback=fallback, specials=specials)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def _with_bytes(ids: Ids, points: NDArray[np.uint32]) -> Ids:
    """Return ids with the characters that have none (-1) written as their UTF-8 bytes."""
    unknown = ids < 0
    sizes = np.where(unknown, 1 + sum((points >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000)), 1)
    written = np.repeat(ids, sizes)
    spelled = b"".join(chr(point).encode("utf-8") for point in points[unknown])
    written[np.repeat(unknown, sizes)] = np.frombuffer(spelled, dtype=np.uint8)
    return written


def _refusal(points: NDArray[np.uint32]) -> str:
    point = int(points[0])
    if 0xDC80 <= point < 0xDD00:
        return f"text is not UTF-8: byte 0x{point - 0xDC00:02x}; tokenizer.fallback=true takes any bytes"
    return (
        f"the training text has no character {chr(point)!a} (one of {len(np.unique(points))} such); "
        f"tokenizer.fallback=true writes it as bytes"
    )


def read_characters(plain: dict[str, Any], *, specials: Sequence[str]) -> CharacterTokenizer:
    """Build the tokenizer that plain data describes, or raise ValueError in one line."""
    alphabet, fallback = plain.get("alphabet"), plain.get("fallback")
    if not isinstance(alphabet, str) or len(set(alphabet)) < len(alphabet):
        raise ValueError(f"tokenizer data: alphabet ({short(alphabet)}) must be a string of different characters")
    if not isinstance(fallback, bool):
        raise ValueError(f"tokenizer data: fallback ({short(fallback)}) must be true or false")
    as_bytes(alphabet)  # no lone surrogates
    return CharacterTokenizer(alphabet=alphabet, fallback=fallback, specials=specials)
