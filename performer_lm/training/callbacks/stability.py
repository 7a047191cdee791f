"""Loss spikes: steps whose loss stands far above the losses before."""

import logging
from typing import Annotated, Any

import torch
from annotated_types import Ge
from lightning.pytorch import Trainer
from torch import Tensor

from performer_lm.ranges import Positive, ranged
from performer_lm.training.callbacks.base import RunCallback, TrainingTask

log = logging.getLogger("performer_lm")


@ranged
class StabilityMonitor(RunCallback):
    """Log `train/loss_z`, the largest loss since the last log in standard deviations above the running mean; warn.

    Mean and variance run over about `window` steps, on the device, without steps that are spikes themselves. The first
    `window` steps only feed them. A loss `threshold` standard deviations above the mean is a spike.
    """

    def __init__(self, *, window: Annotated[int, Ge(2)], threshold: Positive) -> None:
        self.window = window
        self.threshold = threshold
        self._running = torch.zeros(3)  # steps taken in, mean, variance
        self._worst = torch.zeros(3)  # z, step, loss of the worst step since the last log

    def on_gradients(self, trainer: Trainer, task: TrainingTask, *, loss: Tensor, norm: Tensor) -> None:
        """Take in a step's loss; look at the worst where metrics are logged."""
        self._take_in(loss.detach().float(), task.step)
        if task.logs_now:
            z, step, worst = self._worst.tolist()
            self._worst = torch.zeros_like(self._worst)
            task.log("train/loss_z", z)
            if z > self.threshold:
                log.warning("step %d: loss %.3f is a spike, %.1f standard deviations above its mean", step, worst, z)

    def _take_in(self, loss: Tensor, step: int) -> None:
        self._running, self._worst = self._running.to(loss.device), self._worst.to(loss.device)
        count, mean, variance = self._running
        z = (loss - mean) / (variance + 1e-12).sqrt()
        z = torch.where(count >= self.window, z, 0.0)
        found = torch.stack((z, torch.full_like(z, step), loss))
        self._worst = torch.where(z > self._worst[0], found, self._worst)
        share = 1.0 / (count + 1.0).clamp(max=self.window)  # a plain mean at first
        moved = loss - mean
        taken = torch.stack((count + 1.0, mean + share * moved, (1.0 - share) * (variance + share * moved.square())))
        self._running = torch.where(z <= self.threshold, taken, self._running)

    def state_dict(self) -> dict[str, Any]:
        return {"running": self._running.tolist(), "worst": self._worst.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._running, self._worst = torch.tensor(state_dict["running"]), torch.tensor(state_dict["worst"])
