"""The speed of a run."""

import time
from typing import cast

from lightning.pytorch import LightningModule, Trainer

from performer_lm.training.callbacks.base import RunCallback, TrainingTask
from performer_lm.training.peaks import peak_flops


class Throughput(RunCallback):
    """Log `train/tokens_per_second`: tokens of all ranks over time spent training, validation and samples left out.

    Where the device's peak is known, `train/mfu` is the share of it that the model's arithmetic uses (`peaks.py`).
    """

    def __init__(self) -> None:
        self.most_tokens: float | None = None  # per second, at the peak of all devices
        self.seconds = 0.0  # spent training, over the whole run
        self.steps = 0
        self._mark = (0.0, 0)  # seconds and steps at the last log
        self._running_since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peak = peak_flops(trainer.strategy.root_device, precision=str(trainer.precision))
        if peak is not None:
            model, context = cast(TrainingTask, pl_module).model, self.run.context
            self.most_tokens = trainer.world_size * peak / (3 * model.count_flops(context) / context)
        self._running_since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running_since = time.perf_counter()

    def on_step_end(self, trainer: Trainer, task: TrainingTask, step: int) -> None:
        self.steps += 1
        if step % self.run.log_every == 0:
            self._stop()
            seconds, steps = self.seconds - self._mark[0], self.steps - self._mark[1]
            self._mark = (self.seconds, self.steps)
            speed = steps * self.run.tokens_per_step / seconds
            task.log("train/tokens_per_second", speed)
            if self.most_tokens is not None:
                task.log("train/mfu", speed / self.most_tokens)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @property
    def tokens_per_second(self) -> float:
        return self.steps * self.run.tokens_per_step / self.seconds if self.seconds else 0.0

    def _stop(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._running_since
        self._running_since = now
