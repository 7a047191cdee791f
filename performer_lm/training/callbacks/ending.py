"""How a run comes to its end: with a validation, or on a signal, saved."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FinalValidation(Callback):
    """Validate after the last step, whatever the interval between validations."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the trainer to stop once it has taken its last step: stopping, it validates."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


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
