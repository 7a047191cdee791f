"""Windows onto a flat id array: which tokens a step of training sees, and which validation counts.

Letters: `b` batch, `n` context. A window is `n + 1` ids, so that n of them have a next one to predict.

Training batch s is a pure function of (seed, s): no state, no order of calls, so any number of workers, ranks or
resumes sees the same batches. An epoch goes once through all windows of the array in an order of its own, and each
epoch lays its windows out from an offset of its own, so that the cuts fall elsewhere each time.

Validation goes through the array once, each window starting at the last id of the one before: every id but the first
is predicted exactly once.
"""

from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE: Final = -100  # fills up validation windows; cross_entropy's ignore_index

Ids = NDArray[np.integer[Any]]
Positions = NDArray[np.int64]


def shift(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Split windows `(b, n + 1)` into inputs and targets `(b, n)`.

    Targets keep `IGNORE`. Inputs get 0 in its place, which no causal prediction that counts can see: fill comes last.
    """
    return windows[:, :-1].clamp(min=0), windows[:, 1:]


def window_batch(ids: Ids, *, seed: int, step: int, batch_size: int, context: int) -> Tensor:
    """Return training batch `step`, int64 `(batch_size, context + 1)`."""
    starts = window_starts(len(ids), seed=seed, step=step, batch_size=batch_size, context=context)
    return gather_windows(ids, starts, context=context)


def window_starts(num_ids: int, *, seed: int, step: int, batch_size: int, context: int) -> Positions:
    """Return where the windows of training batch `step` start, `(batch_size,)`.

    The batches are the concatenated epochs, cut into pieces of `batch_size`: an epoch may end inside a batch, and a
    batch may be larger than an epoch.

    Raises:
        ValueError: if the array has no room for one window.
    """
    per_epoch = windows_per_epoch(num_ids, context=context)
    places = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs, within = np.divmod(places, per_epoch)
    starts = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        starts[here] = _epoch(seed, int(epoch), num_ids, context)[within[here]]
    return starts


def windows_per_epoch(num_ids: int, *, context: int) -> int:
    """Return how many windows an epoch has, whatever its offset.

    Raises:
        ValueError: if the array has no room for one window.
    """
    if num_ids < context + 1:
        raise ValueError(f"{num_ids} ids are too few: one window needs {context + 1} (context={context})")
    return max(1, num_ids // context - 1)


def gather_windows(ids: Ids, starts: Positions, *, context: int) -> Tensor:
    """Return the windows at `starts` `(b,)`, int64 `(b, context + 1)`."""
    return torch.from_numpy(ids[starts[:, None] + np.arange(context + 1)].astype(np.int64))


def num_validation_windows(num_ids: int, *, context: int) -> int:
    """Return how many windows go once through `num_ids` ids."""
    return -(-(num_ids - 1) // context)


def validation_batch(ids: Ids, *, index: int, batch_size: int, context: int) -> Tensor:
    """Return validation windows `index * batch_size` and following, int64 `(batch_size, context + 1)`.

    What lies past the end of the array is `IGNORE`, up to whole rows: all batches have one shape.
    """
    starts = (index * batch_size + np.arange(batch_size, dtype=np.int64)) * context
    places = starts[:, None] + np.arange(context + 1)
    windows = ids[np.minimum(places, len(ids) - 1)].astype(np.int64)
    return torch.from_numpy(np.where(places < len(ids), windows, IGNORE))


def first_bytes(ids: Ids, byte_lengths: NDArray[np.int64], *, limit: int) -> Ids:
    """Return the longest prefix of `ids` that stands for at most `limit` bytes of text.

    Validation documents lie in the order of a hash of their names, so a prefix is a fixed sample of them.
    """
    longest = ids[: 2 * limit + 2]  # at worst every token is one byte and every document one token
    return longest[: int(np.searchsorted(np.cumsum(byte_lengths[longest]), limit, side="right"))]


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _epoch(seed: int, epoch: int, num_ids: int, context: int) -> Positions:
    """Return the starts of an epoch's windows in their order."""
    random = np.random.default_rng([seed, epoch])
    count = windows_per_epoch(num_ids, context=context)
    offset = int(random.integers(min(context, num_ids - count * context)))
    starts = offset + context * random.permutation(count)
    starts.setflags(write=False)
    return starts
