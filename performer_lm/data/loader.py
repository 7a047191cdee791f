"""Batches of windows as loaders: which rows of a global batch one process takes, and where a resumed run goes on.

Micro-batch i of a process is a pure function of i: its rows of the global batch of step i // accumulation. So ranks,
accumulation and worker processes only share out the same batches, and a position is one number.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from performer_lm.data.windows import FiniteWindows, Windows


class BatchShare(NamedTuple):
    """The part of every global batch that one process takes, in `accumulation` micro-batches."""

    batch_size: int
    accumulation: int
    ranks: int
    rank: int

    @property
    def micro_batch(self) -> int:
        """The sequences of one micro-batch on one rank."""
        return self.batch_size // (self.ranks * self.accumulation)

    def check(self) -> None:
        """Raise ValueError if the batch does not divide over ranks and accumulation."""
        if self.batch_size % (self.ranks * self.accumulation):
            raise ValueError(
                f"data.batch_size ({self.batch_size}) must be a multiple of ranks ({self.ranks}) x "
                f"trainer.accumulate_grad_batches ({self.accumulation})"
            )

    def rows(self, part: int) -> slice:
        """Return the rows of the global batch in micro-batch `part` of its `accumulation`."""
        first = (part * self.ranks + self.rank) * self.micro_batch
        return slice(first, first + self.micro_batch)


@final
class TrainBatches(Dataset[Tensor]):
    """The micro-batches `(micro_batch, context + 1)` of a run of `steps` on one rank."""

    def __init__(self, windows: Windows, share: BatchShare, *, steps: int) -> None:
        self._windows = windows
        self._share = share
        self._steps = steps

    def __len__(self) -> int:
        return self._steps * self._share.accumulation

    def __getitem__(self, index: int) -> Tensor:
        step, part = divmod(index, self._share.accumulation)
        rows = self._share.rows(part)
        return self._windows.rows(step * self._share.batch_size + np.arange(rows.start, rows.stop, dtype=np.int64))


@final
class ValidationBatches(Dataset[Tensor]):
    """The validation micro-batches of one rank: ranks take turns, and each has as many."""

    def __init__(self, windows: FiniteWindows, share: BatchShare) -> None:
        self._windows = windows
        self._share = share

    def __len__(self) -> int:
        return -(-len(self._windows) // (self._share.micro_batch * self._share.ranks))

    def __getitem__(self, index: int) -> Tensor:
        size = self._share.micro_batch
        first = (index * self._share.ranks + self._share.rank) * size
        return self._windows.rows(np.arange(first, first + size, dtype=np.int64))


@final
class RemainingIndices(DistributedSampler[int]):
    """Every index of a data set from `start` on; the length stays that of the whole, as a resuming trainer expects.

    It is a DistributedSampler because a trainer with several ranks replaces any other kind, and the data sets here
    know their rank already.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, len(self)))


@final
class TrainLoader(DataLoader[Tensor]):
    """A loader that a checkpoint can set to a position: the number of micro-batches its trainer has taken.

    The trainer's count is saved, not the loader's: worker processes run ahead of it.

    Args:
        batches: of the run.
        accumulation: micro-batches per step, which a resumed run must share.
        done: gives the trainer's count.
        num_workers: worker processes.
        start_method: of these; None for the platform's way.
        pin_memory: whether batches are put where an accelerator can fetch them from by itself.
    """

    def __init__(
        self,
        batches: TrainBatches,
        *,
        accumulation: int,
        done: Callable[[], int],
        num_workers: int,
        start_method: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._positions = RemainingIndices(batches)
        self._accumulation = accumulation
        self._done = done
        super().__init__(
            batches,
            batch_size=None,
            sampler=self._positions,
            num_workers=num_workers,
            multiprocessing_context=start_method if num_workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done(), "accumulation": self._accumulation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the micro-batches that were done; ValueError if a step has another number of them now."""
        if state["accumulation"] != self._accumulation:
            raise ValueError(
                f"trainer.accumulate_grad_batches ({self._accumulation}) must stay what it was when the checkpoint was "
                f"saved ({state['accumulation']})"
            )
        self._positions.start = state["done"]
