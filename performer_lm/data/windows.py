"""Windows of ids by number, as a batch holds them, and inputs and targets of a training step.

Letters: `b` batch, `n` context. A window is `n + 1` ids, so that n of them have a next one to predict; `IGNORE` fills
up what is shorter, and ids that are read but not predicted are negative (`shown`). A batch is one tensor `(b, n + 1)`.
"""

from abc import ABC, abstractmethod
from typing import Any, Self, TypeVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from performer_lm.data.ids import IGNORE, FlatIds, Ids, Indices, Spans
from performer_lm.data.layouts import ListedLayout, WindowLayout

AnyIds = TypeVar("AnyIds", Tensor, Indices)
ByteLengths = NDArray[np.number[Any]]

__all__ = [
    "IGNORE",
    "ByteLengths",
    "FiniteWindows",
    "Windows",
    "count_first",
    "first_bytes",
    "listed_windows",
    "segments_of",
    "shown",
]


class Windows(ABC):
    """Windows without end: number i is a pure function of i, whatever was asked before."""

    @abstractmethod
    def rows(self, places: Indices) -> Tensor:
        """Return the windows of numbers `places` `(b,)`, int64 `(b, n + 1)`."""

    def to(self, device: torch.device) -> Self:
        """Return the same windows, gathered on a device where that saves copies."""
        return self


@final
class TextWindows(Windows):
    """The windows of a layout onto flat ids."""

    def __init__(self, ids: FlatIds, layout: WindowLayout, *, context: int) -> None:
        self._ids = ids
        self._layout = layout
        self._context = context

    def rows(self, places: Indices) -> Tensor:
        return self._ids.windows(self._layout.spans(places), context=self._context)

    def to(self, device: torch.device) -> Self:
        return type(self)(self._ids.to(device), self._layout, context=self._context)


@final
class FiniteWindows(Windows):
    """The first `count` windows of others, each counted once; numbers past the last give rows of `IGNORE`.

    `byte_lengths` `(vocab,)` says how many bytes of text each id stands for in them.
    """

    def __init__(self, windows: Windows, *, count: int, byte_lengths: ByteLengths) -> None:
        self._windows = windows
        self._count = count
        self.byte_lengths = byte_lengths

    def __len__(self) -> int:
        return self._count

    def rows(self, places: Indices) -> Tensor:
        rows = self._windows.rows(np.minimum(places, self._count - 1))
        if (beyond := places >= self._count).any():
            rows = rows.masked_fill(torch.from_numpy(beyond[:, None]).to(rows.device, non_blocking=True), IGNORE)
        return rows

    def to(self, device: torch.device) -> Self:
        return type(self)(self._windows.to(device), count=self._count, byte_lengths=self.byte_lengths)


def listed_windows(ids: FlatIds, *parts: Spans, context: int, byte_lengths: ByteLengths) -> FiniteWindows:
    """Return windows onto flat ids that lie where `parts` say, one part after the other."""
    layout = ListedLayout(*parts)
    return FiniteWindows(TextWindows(ids, layout, context=context), count=len(layout), byte_lengths=byte_lengths)


def shown(ids: AnyIds) -> AnyIds:
    """Return ids as a window holds those that are read but not predicted; of those, the ids again."""
    return IGNORE - 1 - ids


def segments_of(ids: Tensor, separator: int) -> Tensor:
    """Return the number of each id's document, `(b, n)`: a `separator` begins the next one, which it belongs to.

    A document so opens with the end of the one before it, from which its first token is predicted.
    """
    return (ids == separator).cumsum(1)


def first_bytes(ids: Ids, byte_lengths: NDArray[np.int64], *, limit: int) -> Ids:
    """Return the longest prefix of `ids` that stands for at most `limit` bytes of text.

    Validation documents lie in the order of a hash of their names, so a prefix is a fixed sample of them.
    """
    longest = ids[: 2 * limit + 2]  # at worst every token is one byte and every document one token
    return longest[: int(np.searchsorted(np.cumsum(byte_lengths[longest]), limit, side="right"))]


def count_first(windows: FiniteWindows, *, limit: int) -> int:
    """Return how many of the first windows have together at most `limit` bytes of text to predict, but at least 1."""
    found, left = 0, limit
    for first in range(0, len(windows), 256):
        targets = windows.rows(np.arange(first, min(first + 256, len(windows))))[:, 1:].numpy()
        text = np.where(targets < 0, 0, windows.byte_lengths[np.maximum(targets, 0)]).sum(1)
        fit = int(np.searchsorted(np.cumsum(text), left, side="right"))
        found, left = found + fit, left - int(text.sum())
        if fit < len(text):
            break
    return max(found, 1)
