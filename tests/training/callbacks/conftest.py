"""A trainer and a task that hold just what a callback reads, to show it one step after the other."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from performer_lm.training.callbacks.base import RunCallback


class Steps:
    """Shows gradients of given losses to a callback, and keeps what it logs."""

    def __init__(self, *, log_every: int = 1) -> None:
        self.log_every = log_every
        self.logged: list[tuple[int, str, float]] = []
        self.step = 0
        self.trainer: Any = SimpleNamespace(world_size=1, optimizers=[])

    @property
    def logs_now(self) -> bool:
        return self.step % self.log_every == 0

    def log(self, name: str, value: float) -> None:
        self.logged.append((self.step, name, float(value)))

    def show(self, callback: RunCallback, *losses: float) -> None:
        for loss in losses:
            self.step += 1
            task: Any = self
            callback.on_gradients(self.trainer, task, loss=torch.tensor(loss), norm=torch.tensor(1.0))


@pytest.fixture
def steps() -> type[Steps]:
    return Steps
