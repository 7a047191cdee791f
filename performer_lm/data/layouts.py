"""Where the windows lie on a flat array of ids: in training's order, and for validation.

Letters: `b` batch, `n` context. The array reads `end, document, end, document, ..., end`.

Training's window i is a pure function of (seed, i): no state, no order of calls, so any number of workers, ranks or
resumes sees the same batches. An epoch goes once through all windows in an order of its own; of a stream, each epoch
lays its windows out from an offset of its own, so that the cuts fall elsewhere each time.
"""

from abc import ABC, abstractmethod
from typing import Final, final

import numpy as np

from performer_lm.data.ids import Ids, Positions, Spans

AT_ONCE: Final = 1 << 24  # ids looked through in one go


class Layout(ABC):
    """Window i as a part of the array, for every i from 0 on."""

    @abstractmethod
    def spans(self, places: Positions) -> Spans:
        """Return where the windows of numbers `places` `(b,)` start and stop."""


class FiniteLayout(Layout):
    """So many windows; those past the last are empty."""

    @abstractmethod
    def __len__(self) -> int: ...


class ShuffledLayout(Layout):
    """Epochs after one another, each all windows once in an order of its own.

    Args:
        per_epoch: windows in an epoch.
    """

    def __init__(self, per_epoch: int) -> None:
        self._per_epoch = per_epoch
        self._drawn: dict[int, Positions] = {}

    def spans(self, places: Positions) -> Spans:
        """Cut the concatenated epochs: an epoch may end inside a batch, and a batch may be larger than an epoch."""
        chosen = np.empty_like(places)
        epochs, within = np.divmod(places, self._per_epoch)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._epoch(int(epoch))[within[here]]
        return self._cut(chosen)

    @abstractmethod
    def _draw(self, epoch: int) -> Positions:
        """Return an epoch's windows `(per_epoch,)` in their order, as `_cut` knows them."""

    @abstractmethod
    def _cut(self, chosen: Positions) -> Spans:
        """Return the spans of windows."""

    def _epoch(self, epoch: int) -> Positions:
        if epoch not in self._drawn:  # a batch may lie across two epochs: the last two are kept
            self._drawn = {**dict(list(self._drawn.items())[-1:]), epoch: self._draw(epoch)}
        return self._drawn[epoch]


@final
class StreamLayout(ShuffledLayout):
    """Training's windows on one stream: they begin and end anywhere, and all are full.

    Raises:
        ValueError: if the array has no room for one window.
    """

    def __init__(self, num_ids: int, *, seed: int, context: int) -> None:
        super().__init__(windows_per_epoch(num_ids, context=context))
        self._num_ids = num_ids
        self._seed = seed
        self._context = context

    def _draw(self, epoch: int) -> Positions:
        random = np.random.default_rng([self._seed, epoch])
        count = self._per_epoch
        offset = int(random.integers(min(self._context, self._num_ids - count * self._context)))
        return offset + self._context * random.permutation(count)

    def _cut(self, chosen: Positions) -> Spans:
        return Spans(chosen, chosen + self._context + 1)


@final
class DocumentLayout(ShuffledLayout):
    """Training's windows, one at the start of each document: longer ones are cropped, shorter ones are not filled.

    Args:
        bounds: `(documents + 1,)` positions of the end tokens.
        seed: of the order of the documents.
        context: of a window.
    """

    def __init__(self, bounds: Positions, *, seed: int, context: int) -> None:
        super().__init__(len(bounds) - 1)
        self._bounds = bounds
        self._seed = seed
        self._context = context

    def _draw(self, epoch: int) -> Positions:
        return np.random.default_rng([self._seed, epoch]).permutation(self._per_epoch)

    def _cut(self, chosen: Positions) -> Spans:
        return _cropped(self._bounds, chosen, context=self._context)


@final
class HeldOutStream(FiniteLayout):
    """Windows once through the array, each from the last id of the one before: all ids but the first count once."""

    def __init__(self, num_ids: int, *, context: int) -> None:
        self._num_ids = num_ids
        self._context = context

    def __len__(self) -> int:
        return -(-(self._num_ids - 1) // self._context)

    def spans(self, places: Positions) -> Spans:
        """Lay the windows end to end; the last one may be short."""
        starts = np.minimum(places * self._context, self._num_ids - 1)
        stops = np.minimum(starts + self._context + 1, self._num_ids)
        return Spans(starts, np.where(places < len(self), stops, starts))


@final
class HeldOutDocuments(FiniteLayout):
    """One window at the start of each document, in the array's order."""

    def __init__(self, bounds: Positions, *, context: int) -> None:
        self._bounds = bounds
        self._context = context

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def spans(self, places: Positions) -> Spans:
        """Crop each document to a window."""
        spans = _cropped(self._bounds, np.minimum(places, len(self) - 1), context=self._context)
        return Spans(spans.starts, np.where(places < len(self), spans.stops, spans.starts))


def windows_per_epoch(num_ids: int, *, context: int) -> int:
    """Return how many windows an epoch of a stream has, whatever its offset.

    Raises:
        ValueError: if the array has no room for one window.
    """
    if num_ids < context + 1:
        raise ValueError(f"{num_ids} ids are too few: one window needs {context + 1} (context={context})")
    return max(1, num_ids // context - 1)


def document_bounds(ids: Ids, *, end_id: int) -> Positions:
    """Return the positions of the end tokens, `(documents + 1,)`, never holding more than a part of a large array."""
    parts = [first + np.flatnonzero(ids[first : first + AT_ONCE] == end_id) for first in range(0, len(ids), AT_ONCE)]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _cropped(bounds: Positions, documents: Positions, *, context: int) -> Spans:
    """Return documents `(b,)` with the end tokens around them, as far as a window reaches."""
    starts = bounds[documents]
    return Spans(starts, np.minimum(bounds[documents + 1] + 1, starts + context + 1))
