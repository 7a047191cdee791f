"""How fast a run goes."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log `train/tokens_per_second`: tokens of all ranks over time spent training, validation and samples left out."""

    def __init__(self, *, tokens_per_step: int, every: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.every = every  # optimizer steps between logs
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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step, and log where metrics are logged."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.steps += 1
        if trainer.global_step % self.every == 0:
            self._stop()
            self._running_since = time.perf_counter()
            seconds, steps = self.seconds - self._mark[0], self.steps - self._mark[1]
            self._mark = (self.seconds, self.steps)
            pl_module.log("train/tokens_per_second", steps * self.tokens_per_step / seconds, prog_bar=True)
            pl_module.log("train/lr", trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock for good."""
        self._stop()

    @property
    def tokens_per_second(self) -> float:
        """Return the whole run's rate."""
        return self.steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def _stop(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._running_since
        self._running_since = now
