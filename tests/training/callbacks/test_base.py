from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from performer_lm.training.callbacks.base import RunCallback
from performer_lm.training.run import Run
from performer_lm.training.task import LanguageModelTask


class Notes(RunCallback):
    """Writes down which hook came when, and what it saw."""

    def __init__(self) -> None:
        self.hooks: list[tuple[str, int]] = []
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def on_step_start(self, trainer: Trainer, task: LanguageModelTask, step: int) -> None:
        self.hooks.append(("start", step))

    def on_gradients(self, trainer: Trainer, task: LanguageModelTask, *, loss: Tensor, norm: Tensor) -> None:
        self.hooks.append(("gradients", task.step))
        self.losses.append(loss)
        own = torch.stack([parameter.grad.norm() for parameter in task.parameters() if parameter.grad is not None])
        torch.testing.assert_close(norm, own.norm())  # before clipping
        self.norms.append(norm)

    def on_step_end(self, trainer: Trainer, task: LanguageModelTask, step: int) -> None:
        self.hooks.append(("end", step))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_hooks_count_steps_whatever_the_accumulation(start: Callable[..., Run], parts: int) -> None:
    run, notes = start(f"trainer.accumulate_grad_batches={parts}", "trainer.log_every=100", "run_dir=runs/a"), Notes()
    run.trainer.callbacks.append(notes)
    run.fit()
    assert notes.hooks == [(hook, step) for step in range(1, 5) for hook in ("start", "gradients", "end")]
    assert all(0 < loss < 6 for loss in notes.losses)
