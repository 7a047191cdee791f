"""Tasks whose answers can be counted right or wrong.

A task fills rows of ids at random and says which of them are answers: ids that follow from those before them.
Letters: `b` rows, `n` context.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Final, NamedTuple, final

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

from performer_lm.data.ids import Indices
from performer_lm.ranges import Count, Positive, ranged

Symbols = Annotated[int, Ge(2), Le(2**20)]


class Rows(NamedTuple):
    """Generated rows, and where in the row what an id repeats stands, if it is an answer; `(b, at most n + 1)` each."""

    ids: Indices
    sources: Indices
    """-1 for ids that are no answers."""

    @property
    def answers(self) -> NDArray[np.bool_]:
        """Return which ids are answers."""
        return self.sources >= 0


class Task(ABC):
    """A distribution of rows, whose ids are spelled by `names`."""

    names: list[str]

    @property
    def size(self) -> int | None:
        """How many ids of a row are to be recalled; None for a task that has no other size than its length."""
        return None

    def resized(self, size: int) -> "Task":
        """Return the same task of another size.

        Raises:
            ValueError: for a size that the ids are too few for, or a task without one.
        """
        raise ValueError(f"{type(self).__name__} has no other size than its length")

    @abstractmethod
    def check(self, *, context: int) -> None:
        """Raise ValueError if a row does not fit a window."""

    @abstractmethod
    def draw(self, random: np.random.Generator, *, count: int, context: int) -> Rows:
        """Return `count` rows, independent of each other."""


@ranged
@final
class Copy(Task):
    """Write a random sequence of `symbols` again after a separator: `a d b | a d b`, as long as the context allows."""

    def __init__(self, *, symbols: Symbols) -> None:
        self._symbols: Final = symbols
        self.names = [*_letters("s", symbols), "|"]

    def check(self, *, context: int) -> None:
        _check_context(context, least=2, row="a symbol and its copy")

    def draw(self, random: np.random.Generator, *, count: int, context: int) -> Rows:
        length = context // 2
        sequence = random.integers(self._symbols, size=(count, length))
        separator = np.full((count, 1), self._symbols)
        sources = np.broadcast_to(np.arange(length), sequence.shape)
        return _answered(np.concatenate((sequence, separator), axis=1), sequence, sources)


@ranged
@final
class SelectiveCopy(Task):
    """Write the symbols again that stand scattered in noise: `. c . . a | c a` (Gu and Dao 2023, arXiv:2312.00752).

    A row has `length` symbols, of an alphabet of `symbols`.
    """

    def __init__(self, *, symbols: Symbols, length: Count) -> None:
        self._symbols: Final = symbols
        self._length: Final = length
        self.names = [*_letters("s", symbols), ".", "|"]

    @property
    def size(self) -> int:
        return self._length

    def resized(self, size: int) -> "SelectiveCopy":
        return SelectiveCopy(symbols=self._symbols, length=size)

    def check(self, *, context: int) -> None:
        _check_context(context, least=2 * self._length, row=f"{self._length} symbols and their copy")

    def draw(self, random: np.random.Generator, *, count: int, context: int) -> Rows:
        noise, separator, length = self._symbols, self._symbols + 1, context - self._length
        sequence = random.integers(self._symbols, size=(count, self._length))
        places = np.sort(_distinct(random, count, length, self._length), axis=1)
        shown = np.full((count, length + 1), noise)
        shown[:, -1] = separator
        np.put_along_axis(shown, places, sequence, axis=1)
        return _answered(shown, sequence, places)


@ranged
@final
class Induction(Task):
    """Name the symbol that followed the marker before: `c a > b d a c > b` (Olsson et al. 2022, arXiv:2209.11895)."""

    def __init__(self, *, symbols: Symbols) -> None:
        self._symbols: Final = symbols
        self.names = [*_letters("s", symbols), ">"]

    def check(self, *, context: int) -> None:
        _check_context(context, least=3, row="a marker, a symbol and the marker again")

    def draw(self, random: np.random.Generator, *, count: int, context: int) -> Rows:
        shown = random.integers(self._symbols, size=(count, context))
        rows, places = np.arange(count), random.integers(context - 2, size=count)
        shown[rows, places] = shown[:, -1] = self._symbols
        return _answered(shown, shown[rows, places + 1][:, None], places[:, None] + 1)


@ranged
@final
class Recall(Task):
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927): pairs, then their keys in any order.

    `k3 v1 k5 v2 . . k5 v2 . . . . k3 v1`: after a key comes its value, which is the answer; the rest is blank. How far
    a query stands from the pairs follows a power law, so that many are near.

    Args:
        vocab_size: ids; the first is the blank, then come keys up to the half, then values.
        pairs: of a row.
        power: exponent of the law, above 0; 1 is uniform, the source takes 0.01.
    """

    def __init__(self, *, vocab_size: Symbols, pairs: Count, power: Positive) -> None:
        if vocab_size // 2 - 1 < pairs:
            raise ValueError(f"data.task.vocab_size ({vocab_size}) must be at least {2 * pairs + 2} for {pairs} pairs")
        self._keys: Final = vocab_size // 2 - 1
        self._values: Final = vocab_size - 1 - self._keys
        self._pairs: Final = pairs
        self._power: Final = power
        self.names = [".", *_letters("k", self._keys), *_letters("v", self._values)]

    @property
    def size(self) -> int:
        return self._pairs

    def resized(self, size: int) -> "Recall":
        return Recall(vocab_size=1 + self._keys + self._values, pairs=size, power=self._power)

    def check(self, *, context: int) -> None:
        _check_context(context, least=4 * self._pairs - 1, row=f"{self._pairs} pairs and as many queries")

    def draw(self, random: np.random.Generator, *, count: int, context: int) -> Rows:
        pairs, slots = self._pairs, (context + 1 - 2 * self._pairs) // 2
        keys = 1 + _distinct(random, count, self._keys, pairs)
        values = 1 + self._keys + _distinct(random, count, self._values, pairs)
        weights = np.arange(1, slots + 1, dtype=np.float64) ** (self._power - 1)
        places = 2 * pairs + 2 * _distinct(random, count, slots, pairs, weights=weights)
        ids = np.zeros((count, 2 * pairs + 2 * slots), dtype=np.int64)
        sources = np.full_like(ids, -1)
        ids[:, : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
        np.put_along_axis(ids, places, keys, axis=1)
        np.put_along_axis(ids, places + 1, values, axis=1)
        np.put_along_axis(sources, places + 1, 2 * np.arange(pairs)[None] + 1, axis=1)
        return Rows(ids, sources)


def _answered(shown: Indices, answers: Indices, sources: Indices) -> Rows:
    """Return rows of the ids shown, with the answers after them, which stand at `sources` before."""
    return Rows(np.concatenate((shown, answers), 1), np.concatenate((np.full_like(shown, -1), sources), 1))


def _distinct(
    random: np.random.Generator, count: int, choices: int, size: int, *, weights: NDArray[np.float64] | None = None
) -> Indices:
    """Return `count` rows of `size` different numbers below `choices`, drawn one after another by weight.

    The smallest of exponential waiting times come in the order of such draws (Efraimidis and Spirakis 2006).
    """
    waits = random.exponential(size=(count, choices)) / (1.0 if weights is None else weights)
    return np.argsort(waits, axis=1, kind="stable")[:, :size].astype(np.int64)


def _letters(letter: str, count: int) -> list[str]:
    return [f"{letter}{number}" for number in range(count)]


def _check_context(context: int, *, least: int, row: str) -> None:
    if context < least:
        raise ValueError(f"data.context ({context}) must be at least {least}: {row}")
