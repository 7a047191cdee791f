"""A task as data: row i of a run is a pure function of (seed, i), and only its answers count."""

from functools import lru_cache
from typing import Any, Final, Self, Unpack, final

import numpy as np
import torch
from torch import Tensor

from performer_lm.data.ids import IGNORE, Positions
from performer_lm.data.module import WindowData, WindowOptions, check_least
from performer_lm.data.synthetic.tasks import Task
from performer_lm.data.tokenizer.symbols import SymbolTokenizer
from performer_lm.data.windows import FiniteWindows, Windows, shift, shown

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

    def rows(self, places: Positions) -> Tensor:
        """Return the rows of numbers `places` `(b,)`, int64 `(b, n + 1)`; what is no answer is only `shown`."""
        rows = np.empty((len(places), self._context + 1), dtype=np.int64)
        blocks, within = np.divmod(places, BLOCK)
        for block in np.unique(blocks):
            here = blocks == block
            rows[here] = self._block(int(block))[within[here]]
        return torch.from_numpy(rows)

    def to(self, device: torch.device) -> Self:
        """Return itself: rows are made on the host."""
        del device
        return self

    def _draw(self, block: int) -> Positions:
        random = np.random.default_rng([self._seed, block])
        ids, answers = self._task.draw(random, count=BLOCK, context=self._context)
        filled = np.full((BLOCK, self._context + 1), IGNORE)
        filled[:, : ids.shape[1]] = np.where(answers, ids, shown(ids))
        return filled

    def __reduce__(self) -> tuple[Any, ...]:
        return _task_windows, (self._task, self._seed, self._context)


@final
class HeldOutTask(FiniteWindows):
    """The first rows of a task under a seed that no run has."""

    def __init__(self, task: Task, *, context: int, num_bytes: int, tokenizer: SymbolTokenizer) -> None:
        self.byte_lengths = tokenizer.byte_lengths()
        self._rows = TaskWindows(task, seed=HELD_OUT, context=context)
        targets = shift(self._rows.rows(np.arange(BLOCK)))[1].numpy()
        sizes = np.where(targets == IGNORE, 0, self.byte_lengths[np.maximum(targets, 0)]).sum(1)
        self._length: Final = max(1, round(num_bytes / sizes.mean()))

    def __len__(self) -> int:
        return self._length

    def rows(self, places: Positions) -> Tensor:
        """Return rows by number; past the last one, `IGNORE`."""
        rows = self._rows.rows(places)
        rows[torch.from_numpy(places >= self._length)] = IGNORE
        return rows

    def to(self, device: torch.device) -> Self:
        """Return itself: rows are made on the host."""
        del device
        return self


@final
class SyntheticData(WindowData):
    """A task, generated.

    Args:
        task: what is asked.
        validation_bytes: bytes of answers, as they are spelled, that a run validates on.
        options: of `WindowData`.

    Raises:
        ValueError: for a task that does not fit the context.
    """

    def __init__(self, *, task: Task, validation_bytes: int, **options: Unpack[WindowOptions]) -> None:
        super().__init__(**options)
        check_least(1, validation_bytes=validation_bytes)
        task.check(context=self.context)
        self._task = task
        self._validation_bytes = validation_bytes

    def prepare(self) -> None:
        """Make tokenizer and windows."""
        self.tokenizer = tokenizer = SymbolTokenizer(names=self._task.names)
        self.training = TaskWindows(self._task, seed=self._seed, context=self.context)
        self.validation = self.held_out = HeldOutTask(
            self._task, context=self.context, num_bytes=self._validation_bytes, tokenizer=tokenizer
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return the task and its options."""
        options = {name.removeprefix("_"): value for name, value in vars(self._task).items() if name != "names"}
        return {
            "task": type(self._task).__name__,
            **options,
            "context": self.context,
            "batch_size": self.batch_size,
            "seed": self._seed,
        }

    @property
    def prompt(self) -> str:
        """The first row that is validated on, up to its first answer."""
        inputs, targets = shift(self.validation.rows(np.zeros(1, dtype=np.int64)))
        first = int((targets[0] != IGNORE).nonzero()[0])
        return self.tokenizer.decode(inputs[0, : first + 1].tolist()).strip()

    @property
    def counted(self) -> float:
        """The share of answers in the first rows."""
        rows = TaskWindows(self._task, seed=HELD_OUT, context=self.context).rows(np.arange(BLOCK))
        return float((shift(rows)[1] != IGNORE).float().mean())


def _task_windows(task: Task, seed: int, context: int) -> TaskWindows:
    return TaskWindows(task, seed=seed, context=context)
