"""What happens around the steps of a run: redraws, throughput, progress, samples, saving, stopping.

Lines for people go to the logger `performer_lm`; metrics go to the trainer's loggers.
"""

import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.generation.decode import stream_text
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM

log = logging.getLogger("performer_lm")


class Redraw(Callback):
    """Set random projections before each optimizer step, as a function of the step alone; never inside one."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Redraw where an accumulation window begins."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            _model(pl_module).redraw(trainer.global_step)


class FinalValidation(Callback):
    """Validate after the last step, whatever the interval between validations."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the trainer to stop once it has taken its last step: stopping, it validates."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


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


class Samples(Callback):
    """Print a sample at every validation and keep all of them in `samples.txt`.

    Sampling has a generator of its own, so that it changes nothing in the run.
    """

    tokenizer: Tokenizer
    path: Path

    def __init__(self, *, prompt: str, max_new_tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.sampler = Sampler(temperature=temperature, top_k=top_k)
        self.seed = seed

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the prompt with the model as it is; on the first rank only."""
        if not trainer.is_global_zero:
            return
        continuation = "".join(
            stream_text(
                _model(pl_module),
                self.tokenizer,
                self.prompt,
                max_new_tokens=self.max_new_tokens,
                sampler=self.sampler,
                seed=self.seed,
            )
        )
        title = f"sample at step {trainer.global_step}"
        log.info("--- %s ---\n%s%s\n%s", title, self.prompt, continuation, "-" * (len(title) + 8))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"=== {title} ===\n{self.prompt}{continuation}\n\n")


class StopOnSignal(Callback):
    """On Ctrl-C or SIGTERM, finish the step, save `last.ckpt` and stop; on a second Ctrl-C, stop at once."""

    def __init__(self, *, path: Path) -> None:
        self.path = path
        self.received: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over both signals for the time of the fit."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._receive)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of an optimizer step, and let the trainer come to its end without validating.

        What the step logged is written on the way; an exception from here would lose it.
        """
        if self.received is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.path)
            trainer.limit_val_batches = 0
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.received = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step (Ctrl-C again to stop at once)", file=sys.stderr)


def _model(pl_module: LightningModule) -> PerformerLM:
    return cast(PerformerLM, pl_module.model)


def checkpoints(folder: Path) -> list[Callback]:
    """Save, at every validation, `best.ckpt` where `val/bpb` has fallen and `last.ckpt` anyway."""
    common: dict[str, Any] = {
        "dirpath": folder,
        "save_on_train_epoch_end": False,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    return [
        ModelCheckpoint(filename="best", monitor="val/bpb", mode="min", **common),
        ModelCheckpoint(filename="last", **common),
    ]
