"""Flat arrays of ids, and windows gathered from them: on disk and in memory, or on the device that trains.

Letters: `b` batch, `n` context.
"""

from abc import ABC, abstractmethod
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE: Final = -100  # fills up short windows; cross_entropy's ignore_index

Ids = NDArray[np.integer[Any]]
Indices = NDArray[np.int64]


class Spans(NamedTuple):
    """Parts `ids[start:stop]` of a flat array, none longer than a window; `(b,)` each."""

    starts: Indices
    stops: Indices


class FlatIds(ABC):
    """A flat array of ids from which windows are gathered."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def windows(self, spans: Spans, *, context: int) -> Tensor:
        """Return the spans as rows, int64 `(b, context + 1)`, filled up with `IGNORE`."""

    @abstractmethod
    def to(self, device: torch.device) -> "FlatIds":
        """Return the same ids on a device."""


@final
class HostIds(FlatIds):
    """Ids in memory or, memory-mapped, on disk: a file from its start on, which a worker process opens for itself."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def windows(self, spans: Spans, *, context: int) -> Tensor:
        places = spans.starts[:, None] + np.arange(context + 1)
        if _all_full(spans, context):
            return torch.from_numpy(self._ids[places].astype(np.int64))
        inside = places < spans.stops[:, None]
        return torch.from_numpy(np.where(inside, self._ids[np.where(inside, places, 0)].astype(np.int64), IGNORE))

    def to(self, device: torch.device) -> FlatIds:
        return ResidentIds(self._ids, device=device)

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._ids, np.memmap):
            return _open_mapped, (str(self._ids.filename), self._ids.dtype.name, len(self._ids))
        return HostIds, (self._ids,)


@final
class ResidentIds(FlatIds):
    """Ids on a device, where windows are gathered too: only their starts and stops are sent there.

    The device keeps ids as narrow as the disk does, in the signed type of the same width, which every device can index;
    widening takes the sign away again.
    """

    def __init__(self, ids: Ids, *, device: torch.device) -> None:
        width = ids.dtype.itemsize
        signed = np.array(ids).view(f"int{8 * width}")
        self._ids = torch.from_numpy(signed).to(device)
        self._unsigned = (1 << 8 * width) - 1 if ids.dtype.kind == "u" and width < 8 else -1
        self._device = device

    def __len__(self) -> int:
        return len(self._ids)

    def windows(self, spans: Spans, *, context: int) -> Tensor:
        places = self._send(spans.starts)[:, None] + torch.arange(context + 1, device=self._device)
        if _all_full(spans, context):
            return self._take(places)
        inside = places < self._send(spans.stops)[:, None]
        return torch.where(inside, self._take(torch.where(inside, places, 0)), IGNORE)

    def to(self, device: torch.device) -> FlatIds:
        return self if device == self._device else ResidentIds(self._ids.cpu().numpy(), device=device)

    def _take(self, places: Tensor) -> Tensor:
        return self._ids[places].long() & self._unsigned

    def _send(self, positions: Indices) -> Tensor:
        return torch.from_numpy(positions).to(self._device, non_blocking=True)


def _all_full(spans: Spans, context: int) -> bool:
    return bool((spans.stops - spans.starts == context + 1).all())


def _open_mapped(path: str, dtype: str, length: int) -> HostIds:
    return HostIds(np.memmap(path, dtype=dtype, mode="r", shape=(length,)))
