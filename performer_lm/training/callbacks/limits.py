"""Ends of a run: its last step, a time limit, or validation that no longer gets better.

All end it alike: it validates, saves and says how to go on.
"""

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from performer_lm.ranges import Count, NotNegative, Positive, ranged
from performer_lm.training.callbacks.base import RunCallback, TrainingTask

log = logging.getLogger("performer_lm")


class FinalValidation(Callback):
    """Validate after the last step, whatever the interval between validations."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # stopping, it validates


@ranged
class TimeLimit(RunCallback):
    """End the run at the first step that ends after `minutes` of training and validating in this process.

    A resumed run has the limit anew.
    """

    def __init__(self, *, minutes: Positive) -> None:
        self.minutes = minutes
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()

    def on_step_end(self, trainer: Trainer, task: TrainingTask, step: int) -> None:
        """Stop at the limit; ranks agree on the first one's clock, where metrics are logged."""
        if trainer.world_size > 1 and step % self.run.log_every:
            return
        if trainer.strategy.broadcast(time.monotonic() - self._start >= 60 * self.minutes):
            log.info("step %d: the time limit of %g minutes is reached", step, self.minutes)
            trainer.should_stop = True


def time_limit(*, minutes: Positive | None) -> TimeLimit | None:
    """Build a `TimeLimit`, unless `minutes` is None."""
    return None if minutes is None else TimeLimit(minutes=minutes)


@ranged
def early_stopping(*, patience: Count | None, min_delta: NotNegative) -> EarlyStopping | None:
    """End the run once `val/bpb` has not fallen by `min_delta` for `patience` validations; None for never."""
    if patience is None:
        return None
    return EarlyStopping("val/bpb", mode="min", patience=patience, min_delta=min_delta, check_finite=False)
