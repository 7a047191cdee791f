"""Text to ids and back, byte by byte: every id stands for some bytes of text, and any text can be written.

A tokenizer is its table of pieces, `pieces[id] -> bytes`. The last id ends a document and stands for no bytes, so
bits per byte can be counted from ids alone. Tokenizers are saved as plain data (`to_dict`), which a checkpoint holds
and `tokenizer_from_dict` checks before it builds anything.
"""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Final, final

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, models, pre_tokenizers, trainers

Ids = NDArray[np.int64]
Text = str | bytes

# Where byte pairs never merge across. A word takes the one character before it (a space, a dot, a bracket), so `self`
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

LONGEST_PART: Final = 1 << 16  # characters encoded as one; a longer text is cut at a line
PARTS_AT_ONCE: Final = 64  # parts shared out over the library's threads; bounds what its bulky results take


class Tokenizer(ABC):
    """A table of byte pieces and a way to write text with them.

    Args:
        pieces: the bytes each id stands for, without the end of a document, which becomes the last id.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [*pieces, b""]
        self.vocab_size: Final[int] = len(self._pieces)
        self.end_id: Final[int] = self.vocab_size - 1

    @abstractmethod
    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        """Return the ids of each text, in parallel where that helps; never `end_id`.

        Raises:
            ValueError: for bytes that are not UTF-8, or a string that cannot be written as UTF-8.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `tokenizer_from_dict` builds an equal tokenizer."""

    def encode(self, text: Text) -> Ids:
        """Return the ids `(n,)` of a text; `decode_bytes` gives back its bytes exactly."""
        return self.encode_batch([text])[0]

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of text that one id stands for."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id ({token}) must lie in 0..{self.vocab_size - 1}")
        return self._pieces[token]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that ids `(n,)` stand for."""
        return b"".join(self.token_bytes(int(token)) for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that ids `(n,)` stand for; broken UTF-8 becomes the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> Ids:
        """Return how many bytes of text each id stands for, `(vocab,)`."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)


TokenizerBuilder = Callable[..., Tokenizer]  # called with the training texts


@final
class ByteTokenizer(Tokenizer):
    """Every byte is a token: 256 ids and the end. Takes any bytes, valid UTF-8 or not."""

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)])

    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        """Return the bytes of each text as ids."""
        return [np.frombuffer(_as_bytes(text), dtype=np.uint8).astype(np.int64) for text in texts]

    def to_dict(self) -> dict[str, Any]:
        """Return `{"kind": "bytes"}`: there is nothing to remember."""
        return {"kind": "bytes"}


@final
class BytePairTokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909), run by the `tokenizers` library.

    Ids 0..255 are the bytes themselves, so nothing is unknown; each further id is the first pair in `merges` that
    makes its bytes. The end of a document is known to us only, not to the library: no text can spell it.

    Args:
        merges: pairs of ids, strongest first; each may use the bytes and what earlier pairs made.
        split: the name in `SPLITS` of the pattern whose matches are encoded apart from each other.
    """

    def __init__(self, *, merges: Sequence[Sequence[int]], split: str) -> None:
        pieces = _merged_pieces(merges)
        super().__init__(pieces)
        self._merges = [[left, right] for left, right in merges]
        self._split = split
        names = ["".join(BYTE_NAMES[value] for value in piece) for piece in pieces]
        pairs = [(names[left], names[right]) for left, right in merges]
        self._library = tokenizers.Tokenizer(models.BPE({name: token for token, name in enumerate(names)}, pairs))
        self._library.pre_tokenizer = _split_at(SPLITS[split])

    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        """Return the ids of each text; the library's threads share the parts of all texts."""
        parts = [(index, part) for index, text in enumerate(texts) for part in _parts(_as_str(text))]
        ids: list[list[Ids]] = [[] for _ in texts]
        for first in range(0, len(parts), PARTS_AT_ONCE):
            group = parts[first : first + PARTS_AT_ONCE]
            encodings = self._library.encode_batch_fast([part for _, part in group])
            for (index, _), encoding in zip(group, encodings, strict=True):
                ids[index].append(np.array(encoding.ids, dtype=np.int64))
        return [np.concatenate(of_text) for of_text in ids]

    def to_dict(self) -> dict[str, Any]:
        """Return the merges and the name of the split."""
        return {"kind": "byte_pairs", "split": self._split, "merges": [list(pair) for pair in self._merges]}


def build_bytes(texts: Iterable[bytes]) -> ByteTokenizer:
    """Return the byte tokenizer, which learns nothing from the texts."""
    del texts
    return ByteTokenizer()


def train_byte_pairs(texts: Iterable[bytes], *, vocab_size: int) -> BytePairTokenizer:
    """Train byte-pair encoding on texts; the same texts give the same tokenizer, on any number of threads.

    Args:
        texts: UTF-8 documents.
        vocab_size: ids in all, with the 256 bytes and the end. Little text may not fill it.

    Raises:
        ValueError: if `vocab_size` has no room for the bytes and the end.
    """
    if vocab_size < 257:
        raise ValueError(f"tokenizer.vocab_size ({vocab_size}) must be at least 257: 256 bytes and the end token")
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = _split_at(SPLITS["words"])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator((part for text in texts for part in _parts(_as_str(text))), trainer)
    tokens = {name: value for value, name in enumerate(BYTE_NAMES)}
    merges = []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        merges.append([tokens[left], tokens[right]])
        tokens.setdefault(left + right, len(tokens))
    return BytePairTokenizer(merges=merges, split="words")


def restore_tokenizer(texts: Iterable[bytes], *, plain: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that `plain` describes, as a builder that learns nothing from the texts."""
    del texts
    return tokenizer_from_dict(plain)


def tokenizer_from_dict(plain: Any) -> Tokenizer:
    """Build the tokenizer that `to_dict` described; nothing in the data is run or imported.

    Raises:
        ValueError: in one line, if the data is not what `to_dict` writes.
    """
    kind = plain.get("kind") if isinstance(plain, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "byte_pairs":
        return _read_byte_pairs(plain)
    raise ValueError(f"tokenizer data: kind ({_short(kind)}) must be 'bytes' or 'byte_pairs'")


@final
class TextStream:
    """Turn ids into text as they come; a character is given out once its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that is complete once `ids` are added."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """Return what is left: the replacement character for an unfinished one."""
        return self._decoder.decode(b"", final=True)


def _byte_names() -> list[str]:
    """Return the visible character by which the library spells each byte."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return [chr(value) if value in visible else chr(next(others)) for value in range(256)]


BYTE_NAMES: Final = _byte_names()


def _split_at(pattern: str) -> pre_tokenizers.PreTokenizer:
    apart = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([apart, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _merged_pieces(merges: Sequence[Sequence[int]]) -> list[bytes]:
    """Return the bytes of each id; two merges that make the same bytes make one id."""
    pieces = [bytes([value]) for value in range(256)]
    known = set(pieces)
    for index, pair in enumerate(merges):
        if not all(0 <= token < len(pieces) for token in pair):
            raise ValueError(f"tokenizer data: merge {index} ({_short(pair)}) must use ids in 0..{len(pieces) - 1}")
        if (piece := pieces[pair[0]] + pieces[pair[1]]) not in known:
            known.add(piece)
            pieces.append(piece)
    return pieces


def _read_byte_pairs(plain: dict[str, Any]) -> BytePairTokenizer:
    split, merges = plain.get("split"), plain.get("merges")
    if not isinstance(split, str) or split not in SPLITS:
        raise ValueError(f"tokenizer data: split ({_short(split)}) must be one of {sorted(SPLITS)}")
    if not isinstance(merges, list):
        raise ValueError(f"tokenizer data: merges ({_short(merges)}) must be a list of pairs of ids")
    for index, pair in enumerate(merges):
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(token) is int for token in pair)):
            raise ValueError(f"tokenizer data: merge {index} ({_short(pair)}) must be a pair of ids")
    return BytePairTokenizer(merges=merges, split=split)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _parts(text: str) -> Iterator[str]:
    """Cut a text into parts of bounded length, after a line where there is one."""
    start = 0
    while len(text) - start > LONGEST_PART:
        line = text.rfind("\n", start, start + LONGEST_PART)
        end = line + 1 if line >= 0 else start + LONGEST_PART
        yield text[start:end]
        start = end
    yield text[start:]


def _as_str(text: Text) -> str:
    try:
        return _as_bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None


def _as_bytes(text: Text) -> bytes:
    try:
        return text if isinstance(text, bytes) else text.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = error.object[error.start]
        raise ValueError(f"text cannot be written as UTF-8: {broken!a} at character {error.start}") from None
