"""How a run stops before its end: at a signal, between two steps, with a checkpoint."""

import logging
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm.training.callbacks.agreement import Agreement
from performer_lm.training.callbacks.saving import Checkpoints

log = logging.getLogger("performer_lm")


class StopOnSignal(Callback):
    """On Ctrl-C, SIGTERM or the end of its terminal, finish the step, save and stop; on a second Ctrl-C, stop at once.

    Under SLURM, SIGUSR1 (`sbatch --signal=USR1@120`) does the same before time runs out, and puts the job back in the
    queue. With several ranks, one that is told stops them all, before the same step: the next one, on accelerators the
    one after that.

    Args:
        checkpoints: what saves.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received: int | None = None
        self.stopped: int | None = None  # the signal that ended the run early
        self._told = Agreement()
        self._signals: list[signal.Signals] = []  # taken over

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals for the time of the fit."""
        self._signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup wants the run to outlive its terminal
            self._signals.append(signal.SIGHUP)
        if "SLURM_JOB_ID" in os.environ:
            self._signals.append(signal.SIGUSR1)
        for signum in self._signals:
            signal.signal(signum, self._receive)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save before the next step, and ask the trainer to come to its end (the task then skips the step)."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._is_told(trainer):
            self.checkpoints.save(trainer)
            self.stopped = self.received or signal.SIGTERM
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for signum in self._signals:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    def _is_told(self, trainer: Trainer) -> bool:
        return self._told.reach(trainer, wanted=self.received is not None)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step (Ctrl-C again to stop at once)", file=sys.stderr)


def requeue() -> None:
    """Put this SLURM job back in the queue; it starts anew with the same command, where `ckpt=auto` goes on."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        log.warning("the job cannot be put back in the queue: scontrol: %s", error.strerror)
        return
    if done.returncode:
        log.warning("the job cannot be put back in the queue: %s", done.stderr.strip() or f"code {done.returncode}")
    else:
        log.info("put back in the queue as job %s", job)
