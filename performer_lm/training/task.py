"""The training task: an objective's loss, validation in bits per byte, optimizer and schedule.

Letters: `b` batch, `n` tokens.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from performer_lm.data.windows import IGNORE
from performer_lm.language_model import LanguageModel
from performer_lm.objectives import Objective, shift
from performer_lm.ops.precision import precise
from performer_lm.training.callbacks.base import RunCallback
from performer_lm.training.optim import parameter_groups
from performer_lm.training.sharding import shard


class Sums(NamedTuple):
    """Sums over micro-batches and ranks, in full whatever the run's precision.

    They are no buffers: those take the model's precision, in which 512 + 1 is 512.
    """

    nats: Tensor  # () float64, or float32 where the device has no float64
    counts: Tensor  # (k,) int64

    @classmethod
    def zero(cls, device: torch.device, *, counts: int) -> "Sums":
        """Return sums of nothing, with so many counts."""
        nats = torch.zeros((), dtype=precise(device), device=device)
        return cls(nats, torch.zeros(counts, dtype=torch.int64, device=device))

    def add(self, nats: Tensor, *counts: Tensor) -> None:
        """Add losses of any shape, and a number to each count."""
        self.nats.add_(nats.detach().sum(dtype=self.nats.dtype))
        self.counts.add_(torch.stack(counts))

    def add_ranks(self) -> None:
        """Add up over all ranks; queued on the device, so that the host does not wait."""
        torch.distributed.all_reduce(self.nats)
        torch.distributed.all_reduce(self.counts)


class LanguageModelTask(LightningModule):
    """Train a `LanguageModel` on an objective.

    Args:
        model: the language model.
        objective: what it learns.
        optimizer: factory called with the parameter groups of `parameter_groups`.
        schedule: factory called with the run's optimizer steps.
        byte_lengths: `(vocab,)` bytes of text that each token stands for.
        section: the plain-data section of the checkpoint that rebuilds model and tokenizer.
        log_every: optimizer steps between logged metrics.
        separator: the id that begins a document where tokens see their own document only; None where they see all.
        counted: share of the tokens that count; where only some do, validation tells how many are predicted right.
    """

    byte_lengths: Tensor

    def __init__(
        self,
        model: LanguageModel,
        *,
        objective: Objective,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[..., Callable[[int], float]],
        byte_lengths: Tensor,
        section: Mapping[str, Any],
        log_every: int,
        separator: int | None = None,
        counted: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.schedule = schedule
        self.section = section
        self.log_every = log_every
        self.separator = separator
        self.counted = counted
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)
        self._measured = (model,)  # a tuple, for a module would become a part of this one
        self._step_sums: Sums | None = None  # of this step so far: predictions are counted
        self._sums: Sums  # of this validation so far: predictions, bytes and right answers are

    @property
    def measured(self) -> LanguageModel:
        """The model that validation and samples run: the one that trains, or the one given to `measure`."""
        return self._measured[0]

    def measure(self, model: LanguageModel) -> None:
        """Let validation and samples run another model than the one that trains."""
        self._measured = (model,)

    @property
    def step(self) -> int:
        """The optimizer step being taken, from 1; Lightning counts from 0."""
        return self.global_step + 1

    @property
    def logs_now(self) -> bool:
        """Whether the metrics of this step are logged; only then may the host wait for the device."""
        return self.step % self.log_every == 0 or self.step == self.trainer.max_steps

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
        """Take no further step once a callback has asked the trainer to stop."""
        return -1 if self.trainer.should_stop else None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss that windows `(b, n + 1)` add to their step; log the whole step's at its end."""
        losses = self.objective(self.model, batch, step=self.global_step, separator=self.separator)
        self._step_sums = self._step_sums or Sums.zero(losses.nats.device, counts=1)
        self._step_sums.add(losses.nats, (losses.targets != IGNORE).sum())
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._finish_loss()
        return self.objective.mean(losses) / self.counted

    def _finish_loss(self) -> None:
        """Take nats per predicted token over the step's micro-batches and ranks; log it where metrics are logged."""
        assert self._step_sums is not None
        if self.trainer.world_size > 1:
            self._step_sums.add_ranks()
        nats, (predicted,) = self._step_sums
        self._loss = nats / predicted
        self._step_sums = None
        if self.logs_now:
            self.log("train/loss", self._loss)
            self.log("step", float(self.step))

    def on_validation_epoch_start(self) -> None:
        self._sums = Sums.zero(self.device, counts=3)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add up nats, tokens and bytes of whatever is predicted in windows `(b, n + 1)`."""
        nats, targets = self.objective(self.measured, batch, step=None, separator=self.separator)
        predicted = targets != IGNORE
        text = torch.where(predicted, self.byte_lengths[targets.clamp(min=0)], 0)
        right = predicted.new_zeros(())
        if self.counted < 1:
            inputs, answers = shift(batch)
            right = self.measured(inputs).argmax(-1) == answers
        self._sums.add(nats, predicted.sum(), text.sum(), right.sum())

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` (nats per token), `val/bpb` (bits per byte of text, whatever the tokenizer), accuracy."""
        if self.trainer.world_size > 1:
            self._sums.add_ranks()
        nats, (tokens, text, right) = self._sums
        if not text:
            raise FloatingPointError(
                f"validation at step {self.global_step} measures nothing: not one {self.objective.predicted} of its "
                f"text stands for text; raise data.validation_bytes"
            )
        if self.counted < 1:
            self.log("val/accuracy", right / tokens)
        self.log("step", float(self.global_step))
        self.log("val/loss", nats / tokens)
        self.log("val/bpb", nats / (math.log(2) * text), prog_bar=True)

    def configure_model(self) -> None:
        """Share out the weights, where each process holds a part of them."""
        shard(self, self.model)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and a schedule that moves every optimizer step."""
        optimizer = self.optimizer(parameter_groups(self.model, head=self.model.head))
        steps = int(self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.schedule(steps)), "interval": "step"},
        }

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Show the step's loss and gradient norm to the callbacks, then scale the gradients to `gradient_clip_val`.

        This is our own clipping: Lightning's refuses fused optimizers under mixed precision.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm([_in_full(parameter.grad) for parameter in parameters if parameter.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of gradients that lie on several ranks
        if self.logs_now:
            self.log("train/grad_norm", norm)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunCallback):
                callback.on_gradients(self.trainer, self, loss=self._loss, norm=norm)
        if gradient_clip_val is not None:
            clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the section that rebuilds model and tokenizer."""
        checkpoint["performer_lm"] = dict(self.section)


def _in_full(gradient: Tensor) -> Tensor:
    """Return a gradient, or, where its dtype would round the norm, its norm in float32: a norm of norms is the norm."""
    is_half = torch.finfo(gradient.dtype).bits < 32
    return torch.linalg.vector_norm(gradient, dtype=torch.float32) if is_half else gradient
