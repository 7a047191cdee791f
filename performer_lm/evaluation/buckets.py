"""Ranges of numbers, of a position or a distance, over which losses are averaged.

Letters: `k` buckets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

POSITIONS = (0, 64, 256)
"""Where the first buckets of positions in a window start."""


class Buckets:
    """The ranges between bounds, each from one bound to below the next.

    Args:
        starts: where the first ranges start; then each is twice as far.
        limit: above the largest number; the last range ends there.
    """

    def __init__(self, starts: Sequence[int], *, limit: int) -> None:
        bounds = [start for start in starts if start < limit] or [starts[0]]
        while len(bounds) >= len(starts) and 0 < 2 * bounds[-1] < limit:
            bounds.append(2 * bounds[-1])
        self._inner = np.array(bounds[1:])
        self.labels = [f"{first}-{stop}" for first, stop in zip(bounds, [*bounds[1:], limit], strict=True)]

    def __len__(self) -> int:
        return len(self.labels)

    def find(self, numbers: NDArray[Any]) -> NDArray[np.int64]:
        """Return the bucket of each number; of those below the first one, the first."""
        return np.searchsorted(self._inner, numbers, side="right")

    def add_up(self, numbers: NDArray[Any], values: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """Return the sum of the values, `(k,)`, whose numbers are in each bucket; of 1 each where none are given."""
        return np.bincount(self.find(numbers), values, minlength=len(self)).astype(np.float64)


def as_array(values: Tensor) -> NDArray[Any]:
    """Return the values of a tensor on any device as an array, in float64 where they are no integers."""
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()
