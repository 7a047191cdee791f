"""A run on several processes: how its work is shared out, and how all of them come to be one run.

The first rank decides on the folder and writes to it; the others follow. Lightning starts the other processes with the
first one's command line; what they run is told by an environment variable instead, for a sweep's command line would
make each of them a sweep of its own.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy

from performer_lm.training.callbacks.base import RunCallback
from performer_lm.training.callbacks.saving import Checkpoints
from performer_lm.training.folder import RunFolder
from performer_lm.training.sharding import ShardedStrategy

OVERRIDES = "PERFORMER_LM_OVERRIDES"  # what a process that the first rank starts is to run
STRATEGIES = ("auto", "ddp", "fsdp")
_LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_strategy(name: str, *, timeout: float) -> str | Strategy:
    """Return how several processes share a run.

    Args:
        name: `auto` (one process, or `ddp`), `ddp` (each holds the model, gradients are averaged) or `fsdp` (each holds
            a share of every weight: FSDP2).
        timeout: minutes that a process waits for another before it gives up.

    Raises:
        ValueError: for another name, or no time at all.
    """
    if name not in STRATEGIES:
        raise ValueError(f"trainer.strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    waits = timedelta(minutes=timeout)
    if name == "ddp":
        # buffers are the same on every rank by themselves: functions of (seed, step), or averages over all ranks
        return DDPStrategy(timeout=waits, broadcast_buffers=False, gradient_as_bucket_view=True)
    if name == "fsdp":
        return ShardedStrategy(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=waits)
    return name


class OneRun(Callback):
    """Make all ranks one run: the folder is the first one's, and they go on from the same checkpoint.

    Args:
        folder: of the run.
        saving: what saves there.
        resumed: what this rank goes on from: path and step, as plain text.
    """

    def __init__(self, folder: RunFolder, saving: Checkpoints, *, resumed: str) -> None:
        self.folder = folder
        self.saving = saving
        self.resumed = resumed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follow the first rank.

        Raises:
            RuntimeError: where this rank has found another checkpoint.
        """
        path, resumed = trainer.strategy.broadcast((str(self.folder.path), self.resumed))
        if resumed != self.resumed:
            raise RuntimeError(f"rank {trainer.global_rank} goes on from {self.resumed}, the first one from {resumed}")
        if not trainer.is_global_zero:
            self.folder.path = Path(path)
            self.saving.folder = self.folder.checkpoints
            for callback in cast(Any, trainer).callbacks:
                if isinstance(callback, RunCallback):
                    callback.join(callback.run._replace(folder=self.folder.path))


@contextmanager
def started_processes(trainer: Trainer, overrides: Sequence[str]) -> Iterator[None]:
    """Let the processes that a trainer starts run this very job, and leave nothing of them behind.

    What Lightning leaves in the environment would keep the next job of a sweep from starting its own.
    """
    starts = trainer.world_size > 1 and trainer.strategy.launcher is not None and trainer.global_rank == 0
    before = {name: os.environ.get(name) for name in (*_LAUNCHED, OVERRIDES)}
    if starts:
        os.environ[OVERRIDES] = json.dumps([*overrides, "hydra.mode=RUN"])
    try:
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    finally:
        if starts:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
