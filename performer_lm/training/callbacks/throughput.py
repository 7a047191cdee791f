"""How fast a run goes."""

import time
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from performer_lm.training.callbacks.base import RunCallback

if TYPE_CHECKING:
    from performer_lm.training.task import LanguageModelTask


class Throughput(RunCallback):
    """Log `train/tokens_per_second`: tokens of all ranks over time spent training, validation and samples left out."""

    def __init__(self) -> None:
        self.seconds = 0.0  # spent training, over the whole run
        self.steps = 0
        self._mark = (0.0, 0)  # seconds and steps at the last log
        self._running_since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._running_since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self._running_since = time.perf_counter()

    def on_step_end(self, trainer: Trainer, task: "LanguageModelTask", step: int) -> None:
        """Count a step, and log where metrics are logged."""
        self.steps += 1
        if step % self.run.log_every == 0:
            self._stop()
            seconds, steps = self.seconds - self._mark[0], self.steps - self._mark[1]
            self._mark = (self.seconds, self.steps)
            task.log("train/tokens_per_second", steps * self.run.tokens_per_step / seconds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock for good."""
        self._stop()

    @property
    def tokens_per_second(self) -> float:
        """Return the whole run's rate."""
        return self.steps * self.run.tokens_per_step / self.seconds if self.seconds else 0.0

    def _stop(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._running_since
        self._running_since = now
