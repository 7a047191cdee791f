"""Tokenizers over bytes that the `tokenizers` library runs: spelling of bytes, splits between words.

Letters: none; a *spelled* piece is a string with one visible character a byte, as the library keeps it.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Final

import numpy as np
import tokenizers
from tokenizers import Regex, pre_tokenizers

from performer_lm.data.tokenizer.base import Ids, Text, Tokenizer
from performer_lm.data.tokenizer.utf8 import LONGEST_PART, runs
from performer_lm.wording import short

# Where tokens never reach across. A word takes the one character before it (a space, a dot, a bracket), so `self`
# and `.self` are one token each; punctuation takes the newline after it (`):` + newline); an indentation is one run
# that leaves its last space to the word. On the standard library this gave the fewest tokens of nine patterns tried,
# but for one that lets whole lines merge: that gained 1% and trained six times slower. The bounds keep a megabyte
# without a space (base64, a ruler of dashes) from taking hours.
WORDS: Final = (
    r"[^\r\n\p{L}\p{M}\p{N}_]?[\p{L}\p{M}\p{N}_]{1,32}"
    r"| ?[^\s\p{L}\p{M}\p{N}_]{1,64}[\r\n]{0,64}"
    r"|\s{0,64}[\r\n]{1,64}"
    r"|\s{1,64}(?!\S)"
    r"|\s"
)

SPLITS: Final = {"words": WORDS}  # by the name a saved tokenizer keeps: a pattern, once named, never changes
LONGEST_WORD: Final = 1024  # bytes; more than any match of a pattern


class ByteLevelTokenizer(Tokenizer):
    """A model of the library over the bytes of words. Ids 0..255 are the bytes, so nothing is unknown.

    The end of a document and special tokens are unknown to the library: no text can spell them. Bytes that are not
    UTF-8 are written one by one.

    Args:
        pieces: the bytes of each id.
        model: of the library; knows the pieces as it spells them.
        split: the name in `SPLITS` of the pattern whose matches are encoded apart from each other.
        specials: names of special tokens.
    """

    def __init__(self, pieces: Sequence[bytes], *, model: Any, split: str, specials: Sequence[str]) -> None:
        super().__init__(pieces, specials=specials)
        self._split = split
        self._library = tokenizers.Tokenizer(model)
        self._library.pre_tokenizer = split_at(split)

    @property
    def library(self) -> Any:
        """Return the library's tokenizer, which encodes words."""
        return self._library

    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        return encode_in_runs(self._library, texts)


def encode_in_runs(library: Any, texts: Sequence[Text]) -> list[Ids]:
    """Encode texts with the library, in calls of bounded size; bytes that are not UTF-8 are their own ids."""
    ids: list[list[Ids]] = [[np.empty(0, dtype=np.int64)] for _ in texts]
    for group in _groups(texts):
        strings = [run for _, run in group if isinstance(run, str)]
        encodings = iter(library.encode_batch_fast(strings, add_special_tokens=False))
        for index, run in group:
            if isinstance(run, str):
                ids[index].append(np.array(next(encodings).ids, dtype=np.int64))
            else:
                ids[index].append(np.frombuffer(run, dtype=np.uint8).astype(np.int64))
    return [np.concatenate(of_text) for of_text in ids]


def _groups(texts: Sequence[Text]) -> Iterator[list[tuple[int, Text]]]:
    """Yield the runs of texts, with their texts' indices, in groups of about `LONGEST_PART`."""
    group: list[tuple[int, Text]] = []
    size = 0
    for index, text in enumerate(texts):
        for run in runs(text):
            group.append((index, run))
            size += len(run)
            if size >= LONGEST_PART:
                yield group
                group, size = [], 0
    if group:
        yield group


def training_parts(texts: Iterable[bytes]) -> Iterator[str]:
    """Yield texts in parts of bounded length, for the library's trainers; bytes that are not UTF-8 are left out."""
    for text in texts:
        for run in runs(text):
            if isinstance(run, str):
                yield run


def _byte_names() -> list[str]:
    """Return the visible character by which the library spells each byte."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return [chr(value) if value in visible else chr(next(others)) for value in range(256)]


BYTE_NAMES: Final = _byte_names()
BYTE_VALUES: Final = {name: value for value, name in enumerate(BYTE_NAMES)}


def spell(piece: bytes) -> str:
    """Return a piece as the library spells it."""
    return "".join(BYTE_NAMES[value] for value in piece)


def unspell(spelled: str) -> bytes | None:
    """Return the bytes of a spelled piece; None for a string that spells none."""
    values = [BYTE_VALUES.get(character) for character in spelled]
    return None if None in values else bytes(value for value in values if value is not None)


def read_piece(spelled: str, *, mark: str = "") -> bytes:
    """Return the bytes of a piece in plain data, which may begin with a mark, or raise ValueError: no word has them."""
    piece = unspell(spelled.removeprefix(mark))
    if not piece or len(piece) > LONGEST_WORD:
        found = f"{len(piece):,} bytes; a word has at most {LONGEST_WORD:,}" if piece else "no bytes"
        raise ValueError(f"tokenizer data: piece {short(spelled)} spells {found}")
    return piece


def read_split(plain: dict[str, Any]) -> str:
    """Return the name of the split in plain data, or raise ValueError for a name that is none."""
    split = plain.get("split")
    if not isinstance(split, str) or split not in SPLITS:
        raise ValueError(f"tokenizer data: split ({short(split)}) must be one of {sorted(SPLITS)}")
    return split


def split_at(split: str) -> pre_tokenizers.PreTokenizer:
    """Return the library's splitter at the pattern of a name, which spells the parts too."""
    apart = pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated")
    return pre_tokenizers.Sequence([apart, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
