"""What a run shows while it goes."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("performer_lm")


class ProgressReport(Callback):
    """Show a bar with loss and tokens/s on a terminal, plain lines elsewhere; a line per validation on both."""

    def __init__(self, *, console: Console, every: int) -> None:
        self.every = every  # optimizer steps between readings of the metrics
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.shown = self.bar.add_task("train", metrics="", total=None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self.bar.update(self.shown, total=trainer.max_steps, completed=trainer.global_step)
        self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar; read the metrics, which waits for the device, only where they are logged anyway."""
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.bar.update(self.shown, completed=step)
            if step % self.every == 0 or step == trainer.max_steps:
                metrics = trainer.callback_metrics
                speed = metrics.get("train/tokens_per_second")
                line = f"loss {float(metrics['train/loss']):.3f}"
                line += f"  {float(speed):,.0f} tokens/s" if speed is not None else ""
                self.bar.update(self.shown, metrics=line)
                if self.bar.disable:
                    log.info("step %d/%d  %s", step, trainer.max_steps, line)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what validation found."""
        metrics = trainer.callback_metrics
        loss, bpb = float(metrics["val/loss"]), float(metrics["val/bpb"])
        log.info("step %d  val/loss %.4f  val/bpb %.4f", trainer.global_step, loss, bpb)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar away."""
        self.bar.stop()
