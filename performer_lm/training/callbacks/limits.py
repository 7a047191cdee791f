"""Ends of a run before its last step: the time is up, or validation no longer gets better.

Both end it as its last step would: it validates, saves and says how to go on.
"""

import logging
import time
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from performer_lm.training.callbacks.base import RunCallback

if TYPE_CHECKING:
    from performer_lm.training.task import LanguageModelTask

log = logging.getLogger("performer_lm")


class TimeLimit(RunCallback):
    """End the run at the first step that ends after `minutes` of training and validating in this process.

    Args:
        minutes: the limit; a resumed run has it anew.

    Raises:
        ValueError: for a limit that is not positive.
    """

    def __init__(self, *, minutes: float) -> None:
        if minutes <= 0:
            raise ValueError(f"callbacks.time_limit.minutes must be above 0 or null, got {minutes}")
        self.minutes = minutes
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_step_end(self, trainer: Trainer, task: "LanguageModelTask", step: int) -> None:
        """Look at the clock; ranks agree on what the first one sees, where metrics are logged."""
        if trainer.world_size > 1 and step % self.run.log_every:
            return
        if trainer.strategy.broadcast(time.monotonic() - self._start >= 60 * self.minutes):
            log.info("step %d: the time limit of %g minutes is reached", step, self.minutes)
            trainer.should_stop = True


def time_limit(*, minutes: float | None) -> TimeLimit | None:
    """Build a `TimeLimit`, unless `minutes` is None."""
    return None if minutes is None else TimeLimit(minutes=minutes)


def early_stopping(*, patience: int | None, min_delta: float) -> EarlyStopping | None:
    """End the run once `val/bpb` has not fallen by `min_delta` for `patience` validations; None for never."""
    if patience is None:
        return None
    if patience < 1:
        raise ValueError(f"callbacks.early_stopping.patience must be at least 1 or null, got {patience}")
    return EarlyStopping("val/bpb", mode="min", patience=patience, min_delta=min_delta, check_finite=False)
