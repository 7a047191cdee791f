"""Callbacks that count optimizer steps at any accumulation, and know their run."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.language_model import LanguageModel
from performer_lm.objectives import Objective


class TrainingTask(Protocol):
    """The LightningModule of a run, as callbacks see it."""

    model: LanguageModel
    objective: Objective
    separator: int | None

    @property
    def measured(self) -> LanguageModel: ...
    @property
    def step(self) -> int: ...
    @property
    def logs_now(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    def measure(self, model: LanguageModel) -> None: ...
    def log(self, name: str, value: Any) -> None: ...
    def configure_optimizers(self) -> Any: ...


class RunDetails(NamedTuple):
    """Facts of a run that callbacks use."""

    folder: Path
    console: Console
    tokenizer: Tokenizer
    context: int  # tokens of a window
    tokens_per_step: int  # of all ranks and micro-batches
    log_every: int  # optimizer steps between logged metrics


class RunCallback(Callback):
    """A callback that counts optimizer steps, from 1, where Lightning's hooks count micro-batches."""

    run: RunDetails

    def join(self, run: RunDetails) -> None:
        """Take part in a run, before it starts."""
        self.run = run

    def on_step_start(self, trainer: Trainer, task: TrainingTask, step: int) -> None:
        """Act before the first micro-batch of a step."""

    def on_gradients(self, trainer: Trainer, task: TrainingTask, *, loss: Tensor, norm: Tensor) -> None:
        """Act between a step's gradients and its update.

        Args:
            trainer: at step `task.step`.
            task: whose parameters hold the clipped gradients.
            loss: nats per predicted token of the whole step, on the device.
            norm: of the gradients before they were clipped, on the device.
        """

    def on_step_end(self, trainer: Trainer, task: TrainingTask, step: int) -> None:
        """Act after a step's update."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.on_step_start(trainer, cast(TrainingTask, pl_module), trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, cast(TrainingTask, pl_module), trainer.global_step)
