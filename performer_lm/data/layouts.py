"""Where the windows lie on a flat array of ids: in training's order, and for validation.

Letters: `b` batch, `n` context. The array reads `end, document, end, document, ..., end`.

Training's window i is a pure function of (seed, i): no state, no order of calls, so any number of workers, ranks or
resumes sees the same batches. An epoch goes once through all windows in an order of its own; of a stream, each epoch
lays its windows out from an offset of its own, so that the cuts fall elsewhere each time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, final

import numpy as np

from performer_lm.data.ids import Ids, Indices, Spans

AT_ONCE: Final = 1 << 24  # ids looked through in one go
BLOCK: Final = 1000  # windows of a mixture in which every corpus has its share


class WindowLayout(ABC):
    """Window i as a part of the array, for every i from 0 on."""

    @abstractmethod
    def spans(self, places: Indices) -> Spans:
        """Return where the windows of numbers `places` `(b,)` start and stop."""


class ShuffledLayout(WindowLayout):
    """Epochs after one another, each all `per_epoch` windows once in an order of its own."""

    def __init__(self, per_epoch: int) -> None:
        self.per_epoch: Final = per_epoch
        self._drawn: dict[int, Indices] = {}

    def spans(self, places: Indices) -> Spans:
        chosen = np.empty_like(places)
        epochs, within = np.divmod(places, self.per_epoch)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._epoch(int(epoch))[within[here]]
        return self._cut(chosen)

    @abstractmethod
    def _draw(self, epoch: int) -> Indices:
        """Return an epoch's windows `(per_epoch,)` in their order, as `_cut` knows them."""

    @abstractmethod
    def _cut(self, chosen: Indices) -> Spans:
        """Return the spans of windows."""

    def _epoch(self, epoch: int) -> Indices:
        if epoch not in self._drawn:  # a batch may lie across two epochs: the last two are kept
            self._drawn = {**dict(list(self._drawn.items())[-1:]), epoch: self._draw(epoch)}
        return self._drawn[epoch]


@final
class StreamLayout(ShuffledLayout):
    """Training's windows on one stream: they begin and end anywhere, and all are full.

    Args:
        num_ids: of the stream.
        seed: of the order of the windows.
        context: of a window.
        first: position of the stream in the array.
    """

    def __init__(self, num_ids: int, *, seed: int, context: int, first: int = 0) -> None:
        super().__init__(windows_per_epoch(num_ids, context=context))
        self._first = first
        self._num_ids = num_ids
        self._seed = seed
        self._context = context

    def _draw(self, epoch: int) -> Indices:
        random = np.random.default_rng([self._seed, epoch])
        count = self.per_epoch
        offset = int(random.integers(self._num_ids - count * self._context))
        return self._first + offset + self._context * random.permutation(count)

    def _cut(self, chosen: Indices) -> Spans:
        return Spans(chosen, chosen + self._context + 1)


@final
class DocumentLayout(ShuffledLayout):
    """Training's windows, one at the start of each document: longer ones are cropped, shorter ones are not filled.

    Args:
        bounds: `(documents + 1,)` positions of the end tokens.
        seed: of the order of the documents.
        context: of a window.
    """

    def __init__(self, bounds: Indices, *, seed: int, context: int) -> None:
        super().__init__(len(bounds) - 1)
        self._documents = ListedLayout(document_spans(bounds, context=context))
        self._seed = seed

    def _draw(self, epoch: int) -> Indices:
        return np.random.default_rng([self._seed, epoch]).permutation(self.per_epoch)

    def _cut(self, chosen: Indices) -> Spans:
        return self._documents.spans(chosen)


@final
class MixtureLayout(WindowLayout):
    """Windows of several layouts, mixed by weight: of every `BLOCK` windows each gets its share, in a random order."""

    def __init__(self, layouts: Sequence[WindowLayout], weights: Sequence[float], *, seed: int) -> None:
        self._layouts = list(layouts)
        self._counts = shares(weights)
        self._seed = seed

    def spans(self, places: Indices) -> Spans:
        layouts, numbers = np.empty_like(places), np.empty_like(places)
        blocks, within = np.divmod(places, BLOCK)
        for block in np.unique(blocks):
            here = blocks == block
            turns, turn_numbers = self._turns(int(block))
            layouts[here], numbers[here] = turns[within[here]], turn_numbers[within[here]]
        starts, stops = np.empty_like(places), np.empty_like(places)
        for index, layout in enumerate(self._layouts):
            mine = layouts == index
            starts[mine], stops[mine] = layout.spans(numbers[mine])
        return Spans(starts, stops)

    def _turns(self, block: int) -> tuple[Indices, Indices]:
        """Return whose turn each window of a block is, and which of the layout's own windows that is."""
        turns = np.random.default_rng([self._seed, block, len(self._layouts)]).permutation(
            np.repeat(np.arange(len(self._counts)), self._counts)
        )
        numbers = np.empty(BLOCK, dtype=np.int64)
        for index, count in enumerate(self._counts):
            numbers[turns == index] = block * count + np.arange(count)
        return turns, numbers


@final
class ListedLayout(WindowLayout):
    """So many windows, each where it is said to lie."""

    def __init__(self, *parts: Spans) -> None:
        self._starts, self._stops = (np.concatenate(each) for each in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self._starts)

    def spans(self, places: Indices) -> Spans:
        return Spans(self._starts[places], self._stops[places])


def stream_spans(num_ids: int, *, context: int, first: int = 0) -> Spans:
    """Return windows once through a stream, each from the last id of the one before; the last one may be short.

    All ids but the first are predicted once.
    """
    starts = np.arange(0, num_ids - 1, context, dtype=np.int64)
    return Spans(first + starts, first + np.minimum(starts + context + 1, num_ids))


def document_spans(bounds: Indices, *, context: int) -> Spans:
    """Return the documents between end tokens at `bounds`, with these, in order, as far as a window reaches."""
    return Spans(bounds[:-1], np.minimum(bounds[1:] + 1, bounds[:-1] + context + 1))


def shares(weights: Sequence[float]) -> Indices:
    """Return how many of `BLOCK` windows each weight is worth, in whole numbers; ValueError for less than half one."""
    wanted = BLOCK * np.array(weights, dtype=np.float64) / math.fsum(weights) if min(weights) > 0 else np.zeros(1)
    if not (wanted >= 0.5).all():
        raise ValueError(f"data.weights ({', '.join(map(str, weights))}) must each be at least 1/{2 * BLOCK} of all")
    counts = np.floor(wanted).astype(np.int64)
    counts[np.argsort(counts - wanted, kind="stable")[: BLOCK - counts.sum()]] += 1
    return counts


def windows_per_epoch(num_ids: int, *, context: int) -> int:
    """Return how many windows an epoch of a stream has, whatever its offset; ValueError for too few ids for one."""
    if num_ids < context + 1:
        raise ValueError(f"{num_ids} ids are too few: one window needs {context + 1} (context={context})")
    return max(1, num_ids // context - 1)


def document_bounds(ids: Ids, *, end_id: int) -> Indices:
    """Return the positions of the end tokens, `(documents + 1,)`, never holding more than a part of a large array."""
    parts = [first + np.flatnonzero(ids[first : first + AT_ONCE] == end_id) for first in range(0, len(ids), AT_ONCE)]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
