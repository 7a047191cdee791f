"""The training task: next-token loss, validation in bits per byte, optimizer and schedule.

Letters: `b` batch, `n` tokens.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric

from performer_lm.data.windows import IGNORE, segments_of, shift
from performer_lm.model import PerformerLM
from performer_lm.training.optim import parameter_groups


class LanguageModelTask(LightningModule):
    """Train a `PerformerLM` to predict each next token.

    Args:
        model: the language model.
        optimizer: factory called with the parameter groups of `parameter_groups`.
        schedule: factory called with the run's optimizer steps.
        byte_lengths: `(vocab,)` bytes of text that each token stands for.
        section: the plain-data section of the checkpoint that rebuilds model and tokenizer.
        log_every: optimizer steps between logged metrics.
        separator: the id that begins a document where tokens see their own document only; None where they see all.
    """

    byte_lengths: Tensor

    def __init__(
        self,
        model: PerformerLM,
        *,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[..., Callable[[int], float]],
        byte_lengths: Tensor,
        section: Mapping[str, Any],
        log_every: int,
        separator: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.section = section
        self.log_every = log_every
        self.separator = separator
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)
        self.nats = SumMetric()
        self.tokens = SumMetric()
        self.bytes = SumMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss in nats per token of windows `(b, n + 1)`."""
        del batch_idx
        loss = next_token_loss(self.model, batch, separator=self.separator).mean()
        self.log("train/loss", loss)
        self.log(
            "step", float(self.global_step + 1)
        )  # Lightning counts from 0: name what is logged by the step it ends
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add up nats, tokens and bytes of text over windows `(b, n + 1)`, padded with `IGNORE`."""
        del batch_idx
        targets = batch[:, 1:]
        self.nats.update(next_token_loss(self.model, batch, separator=self.separator).sum())
        self.tokens.update((targets != IGNORE).sum())
        self.bytes.update(torch.where(targets == IGNORE, 0, self.byte_lengths[targets.clamp(min=0)]).sum())

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` (nats per token) and `val/bpb` (bits per byte of text, whatever the tokenizer)."""
        nats, tokens, text = (metric.compute() for metric in (self.nats, self.tokens, self.bytes))
        for metric in (self.nats, self.tokens, self.bytes):
            metric.reset()
        self.log("val/loss", nats / tokens)
        self.log("val/bpb", nats / (math.log(2) * text), prog_bar=True)

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
        """Scale all gradients down to a global norm of at most `gradient_clip_val`, and log the norm they had.

        Raises:
            FloatingPointError: for a norm that is not finite, before it reaches the weights; on an accelerator, where
                looking means waiting, only where metrics are logged anyway.
        """
        del gradient_clip_algorithm
        bound = math.inf if gradient_clip_val is None else gradient_clip_val
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), bound)
        self.log("train/grad_norm", norm)
        step = self.global_step + 1
        looks = norm.device.type == "cpu" or step % self.log_every == 0
        if looks and not math.isfinite(norm.item()):
            rate = optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"the gradient norm is {norm.item()} at step {step} (learning rate {rate:.3g}); "
                f"a lower optimizer.lr may help"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes the file enough to rebuild model and tokenizer."""
        checkpoint["performer_lm"] = dict(self.section)


def next_token_loss(model: PerformerLM, windows: Tensor, *, separator: int | None = None) -> Tensor:
    """Return the loss `(b, n)` in nats of every next token of windows `(b, n + 1)`; zero where it is `IGNORE`.

    With a `separator`, tokens see their own document only, which that id begins.
    """
    inputs, targets = shift(windows)
    segments = None if separator is None else segments_of(inputs, separator)
    logits = rearrange(model(inputs, segments=segments), "b n vocab -> (b n) vocab").float()
    losses = F.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORE, reduction="none")
    return losses.reshape(targets.shape)
