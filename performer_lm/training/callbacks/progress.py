"""The progress of a run, as a bar or as lines."""

import logging
from typing import Final

from lightning.pytorch import LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from performer_lm.training.callbacks.base import RunCallback, RunDetails, TrainingTask

log = logging.getLogger("performer_lm")

VALIDATED: Final = ("val/loss", "val/bpb", "val/accuracy")


class ProgressReport(RunCallback):
    """Show a bar with loss and tokens/s on a terminal, plain lines elsewhere; a line per validation on both."""

    def join(self, run: RunDetails) -> None:
        """Make the bar, shown only on a terminal that can redraw a line."""
        super().join(run)
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=run.console,
            disable=not run.console.is_terminal or run.console.is_dumb_terminal,
        )
        self.shown = self.bar.add_task("train", metrics="", total=None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.update(self.shown, total=trainer.max_steps, completed=trainer.global_step)
        self.bar.start()

    def on_step_end(self, trainer: Trainer, task: TrainingTask, step: int) -> None:
        """Move the bar; read the metrics, which waits for the device, only where they are logged anyway."""
        self.bar.update(self.shown, completed=step)
        if step % self.run.log_every and step != trainer.max_steps:
            return
        metrics = trainer.callback_metrics
        line = f"loss {float(metrics['train/loss']):.3f}"
        for name, spelled in (("train/tokens_per_second", "{:,.0f} tokens/s"), ("train/mfu", "MFU {:.1%}")):
            line += f"  {spelled.format(float(metrics[name]))}" if name in metrics else ""
        self.bar.update(self.shown, metrics=line)
        if self.bar.disable:
            log.info("step %d/%d  %s", step, trainer.max_steps, line)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        found = [f"{name} {float(metrics[name]):.4f}" for name in VALIDATED if name in metrics]
        log.info("step %d  %s", trainer.global_step, "  ".join(found))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.bar.stop()
