"""Recipes of tokenizers: options that are checked before any text is read, and the way from text to tokenizer."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, final

from annotated_types import Ge, Le

from performer_lm.data.reading import check_regular
from performer_lm.data.tokenizer.base import Tokenizer
from performer_lm.data.tokenizer.byte_pairs import train_byte_pairs
from performer_lm.data.tokenizer.characters import ByteTokenizer, learn_characters
from performer_lm.data.tokenizer.library import LibraryTokenizer
from performer_lm.data.tokenizer.plain import tokenizer_from_dict
from performer_lm.data.tokenizer.unigram import train_unigram
from performer_lm.data.tokenizer.word_pieces import train_word_pieces
from performer_lm.ranges import Count, ranged
from performer_lm.wording import did_you_mean, short

VocabSize = Annotated[int, Ge(1), Le(2**22)]  # the tokenizers library aborts where it finds no room for more


class TokenizerRecipe(ABC):
    """A tokenizer that is yet to be built."""

    learns: ClassVar[bool] = False
    """Whether it depends on the texts, and is worth keeping."""

    @abstractmethod
    def build(self, texts: Iterable[bytes], *, num_bytes: int) -> Tokenizer:
        """Return the tokenizer.

        Args:
            texts: the training documents; they can be gone through any number of times.
            num_bytes: how much text that is.
        """

    @abstractmethod
    def key(self) -> dict[str, Any]:
        """Return plain data that names everything the tokenizer depends on, but for the texts."""


@dataclass(frozen=True, kw_only=True)
class _Learned(TokenizerRecipe):
    """A recipe whose tokenizer depends on its fields and the texts alone."""

    specials: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "specials", list(self.specials))  # plain, whatever the config's lists are made of
        ByteTokenizer(specials=self.specials)  # names that are none are refused before any text is read

    def key(self) -> dict[str, Any]:
        return {"recipe": type(self).__name__, **asdict(self)}


@ranged
@dataclass(frozen=True, kw_only=True)
class _Trained(_Learned):
    """A recipe that trains on texts.

    Args:
        vocab_size: ids in all.
        train_bytes: text to learn from at most; of more, every k-th document is taken.
    """

    learns: ClassVar[bool] = True
    least: ClassVar[tuple[int, str]]
    """How many pieces every tokenizer of the kind has, and which."""
    vocab_size: VocabSize
    train_bytes: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        count, pieces = self.least
        least = count + 1 + len(self.specials)
        if self.vocab_size < least:
            more = " and the special tokens" if self.specials else ""
            raise ValueError(
                f"tokenizer.vocab_size ({self.vocab_size}) must be at least {least}: {pieces}, the end token{more}"
            )

    @staticmethod
    @abstractmethod
    def train(texts: Iterable[bytes], *, vocab_size: int, specials: Sequence[str]) -> Tokenizer:
        """Train the tokenizer."""

    def build(self, texts: Iterable[bytes], *, num_bytes: int) -> Tokenizer:
        sample = Sample(texts, num_bytes=num_bytes, limit=self.train_bytes)
        return self.train(sample, vocab_size=self.vocab_size, specials=self.specials)


@final
@dataclass(frozen=True, kw_only=True)
class Bytes(_Learned):
    """The byte tokenizer, which learns nothing."""

    def build(self, texts: Iterable[bytes], *, num_bytes: int) -> Tokenizer:
        return ByteTokenizer(specials=self.specials)


@ranged
@final
@dataclass(frozen=True, kw_only=True)
class Characters(_Learned):
    """The characters of the training documents.

    Args:
        vocab_size: ids in all, for the most frequent characters; None for all of them.
        fallback: whether other characters are written as bytes; else they are refused.
    """

    learns: ClassVar[bool] = True
    vocab_size: VocabSize | None
    fallback: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 256 * self.fallback + 1 + len(self.specials)
        if self.vocab_size is not None and self.vocab_size < least:
            raise ValueError(f"tokenizer.vocab_size ({self.vocab_size}) must be at least {least}")

    def build(self, texts: Iterable[bytes], *, num_bytes: int) -> Tokenizer:
        return learn_characters(texts, vocab_size=self.vocab_size, fallback=self.fallback, specials=self.specials)


@final
class BytePairs(_Trained):
    """Byte-level byte-pair encoding."""

    least = (256, "256 bytes")
    train = staticmethod(train_byte_pairs)


@final
class WordPieces(_Trained):
    """Byte-level WordPiece."""

    least = (512, "256 bytes at the start of a word and 256 inside")
    train = staticmethod(train_word_pieces)


@final
class Unigram(_Trained):
    """The byte-level unigram model."""

    least = (256, "256 bytes")
    train = staticmethod(train_unigram)


@final
class TokenizerFile(TokenizerRecipe):
    """A `tokenizer.json`.

    Args:
        path: the file, or a folder that holds one of that name; ValueError, in one line, where it is not a tokenizer.
        specials: names of special tokens to add.
    """

    def __init__(self, *, path: str | None, specials: list[str]) -> None:
        if path is None:
            raise ValueError("tokenizer.path is not given: tokenizer=json needs tokenizer.path=FILE")
        self._tokenizer = LibraryTokenizer(content=_read_json(path), specials=list(specials))

    def build(self, texts: Iterable[bytes], *, num_bytes: int) -> Tokenizer:
        return self._tokenizer

    def key(self) -> dict[str, Any]:
        plain = json.dumps(self._tokenizer.to_dict(), sort_keys=True)
        return {"recipe": "TokenizerFile", "content": sha256(plain.encode()).hexdigest()}


@final
class Restored(TokenizerRecipe):
    """The tokenizer of a checkpoint, from the plain data that its `to_dict` wrote."""

    def __init__(self, *, plain: dict[str, Any]) -> None:
        self._tokenizer = tokenizer_from_dict(plain)

    def build(self, texts: Iterable[bytes], *, num_bytes: int) -> Tokenizer:
        return self._tokenizer

    def key(self) -> dict[str, Any]:
        return {"recipe": "Restored", "plain": self._tokenizer.to_dict()}


@final
class Sample:
    """At most `limit` bytes of texts: every k-th of them, the last one cut. Can be gone through again."""

    def __init__(self, texts: Iterable[bytes], *, num_bytes: int, limit: int) -> None:
        self._texts = texts
        self._every = -(-num_bytes // limit)
        self._limit = limit

    def __iter__(self) -> Iterator[bytes]:
        left = self._limit
        for text in islice(self._texts, 0, None, max(self._every, 1)):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


def _read_json(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.exists():
        check_regular(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        there = {each.name for each in path.parent.glob("*.json")}
        hint = did_you_mean(path.name, there, prefix=str(path.parent / "_")[:-1], cutoff=0.4)
        raise ValueError(f"tokenizer.path={name} cannot be read: {error.strerror}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer.path={name} is not JSON: {short(str(error))}") from None
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer.path={name} is not a tokenizer.json")
    return content
