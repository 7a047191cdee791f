"""A task as data: row i of a run is a pure function of (seed, i), and only its answers count."""

from functools import lru_cache, partial
from typing import Any, Final, Unpack, final

import numpy as np
import torch
from torch import Tensor

from performer_lm.data.ids import IGNORE, Indices
from performer_lm.data.module import WindowData, WindowOptions
from performer_lm.data.synthetic.tasks import Task
from performer_lm.data.tokenizer.symbols import SymbolTokenizer
from performer_lm.data.windows import FiniteWindows, Windows, shown
from performer_lm.ranges import Count, ranged

BLOCK: Final = 256  # rows drawn together
HELD_OUT: Final = 2**32 + 1  # where a seed stands for training: no run has it


@final
class TaskWindows(Windows):
    """Rows of a task without end."""

    def __init__(self, task: Task, *, seed: int, context: int) -> None:
        self._task = task
        self._seed = seed
        self._context = context
        self._block = lru_cache(maxsize=4)(self._draw)

    def rows(self, places: Indices) -> Tensor:
        rows = np.empty((len(places), self._context + 1), dtype=np.int64)
        blocks, within = np.divmod(places, BLOCK)
        for block in np.unique(blocks):
            here = blocks == block
            rows[here] = self._block(int(block))[within[here]]
        return torch.from_numpy(rows)

    def _draw(self, block: int) -> Indices:
        random = np.random.default_rng([self._seed, block])
        rows = self._task.draw(random, count=BLOCK, context=self._context)
        filled = np.full((BLOCK, self._context + 1), IGNORE)
        filled[:, : rows.ids.shape[1]] = np.where(rows.answers, rows.ids, shown(rows.ids))
        return filled

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(TaskWindows, seed=self._seed, context=self._context), (self._task,)


@ranged
@final
class SyntheticData(WindowData):
    """A task, generated; ValueError for one that does not fit the context.

    Args:
        task: source of rows and answers.
        validation_bytes: bytes of answers, as they are spelled, that a run validates on.
        options: of `WindowData`.
    """

    def __init__(self, *, task: Task, validation_bytes: Count, **options: Unpack[WindowOptions]) -> None:
        super().__init__(**options)
        task.check(context=self.context)
        self.task = task
        self._validation_bytes = validation_bytes
        self._unseen = TaskWindows(task, seed=HELD_OUT, context=self.context)

    def prepare(self) -> None:
        self.tokenizer = SymbolTokenizer(names=self.task.names)
        self.training = TaskWindows(self.task, seed=self._seed, context=self.context)
        lengths = self.tokenizer.byte_lengths()
        targets = self._first_targets().numpy()
        sizes = np.where(targets < 0, 0, lengths[np.maximum(targets, 0)]).sum(1)
        count = max(1, round(self._validation_bytes / sizes.mean()))
        self.validation = self.held_out = FiniteWindows(self._unseen, count=count, byte_lengths=lengths)

    def fingerprint(self) -> dict[str, Any]:
        options = {name.removeprefix("_"): value for name, value in vars(self.task).items() if name != "names"}
        return {
            "task": type(self.task).__name__,
            **options,
            "context": self.context,
            "batch_size": self.batch_size,
            "seed": self._seed,
        }

    @property
    def prompt(self) -> str:
        """The first row that is validated on, up to its first answer."""
        ids = self.validation.rows(np.zeros(1, dtype=np.int64))[0]
        first = int((ids[1:] >= 0).nonzero()[0])
        return self.tokenizer.decode(torch.where(ids < 0, shown(ids), ids)[: first + 1].tolist()).strip()

    @property
    def counted(self) -> float:
        return float((self._first_targets() >= 0).float().mean())

    def _first_targets(self) -> Tensor:
        return self._unseen.rows(np.arange(BLOCK))[:, 1:]
