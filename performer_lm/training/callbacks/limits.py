"""Ends of a run before its last step: the time is up, or validation no longer gets better.

Both end it as its last step would: it validates, saves and says how to go on.
"""

import logging
import time
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from performer_lm.ranges import Count, NotNegative, Positive, ranged
from performer_lm.training.callbacks.base import RunCallback

if TYPE_CHECKING:
    from performer_lm.training.task import LanguageModelTask

log = logging.getLogger("performer_lm")


@ranged
class TimeLimit(RunCallback):
    """End the run at the first step that ends after `minutes` of training and validating in this process.

    Args:
        minutes: the limit; a resumed run has it anew.

    Raises:
        ValueError: for a limit that is not positive.
    """

    def __init__(self, *, minutes: Positive) -> None:
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


def time_limit(*, minutes: Positive | None) -> TimeLimit | None:
    """Build a `TimeLimit`, unless `minutes` is None."""
    return None if minutes is None else TimeLimit(minutes=minutes)


@ranged
def early_stopping(*, patience: Count | None, min_delta: NotNegative) -> EarlyStopping | None:
    """End the run once `val/bpb` has not fallen by `min_delta` for `patience` validations; None for never."""
    if patience is None:
        return None
    return EarlyStopping("val/bpb", mode="min", patience=patience, min_delta=min_delta, check_finite=False)
