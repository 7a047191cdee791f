"""A run on several processes: how its work is shared out, and how all of them come to be one run.

The first rank decides on the folder and writes to it; the others follow. Lightning starts the other processes with the
first one's command line; what they run is told by an environment variable instead, for a sweep's command line would
make each of them a sweep of its own.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from performer_lm.nn.branch import Branch
from performer_lm.nn.residual import Reversible
from performer_lm.training.callbacks.base import RunCallback
from performer_lm.training.callbacks.ema import WeightAverage
from performer_lm.training.callbacks.samples import Samples
from performer_lm.training.callbacks.saving import Checkpoints
from performer_lm.training.carrying import keyed_by_name
from performer_lm.training.optim import Together

if TYPE_CHECKING:
    from performer_lm.training.folder import RunFolder
    from performer_lm.training.task import LanguageModelTask

log = logging.getLogger("performer_lm")

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
        return _Sharded(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=waits)
    return name


class _Sharded(ModelParallelStrategy):
    """FSDP2 over all processes; whole weights come together on the first rank, and our own writer saves them."""

    def setup_environment(self) -> None:
        """Share out over as many ranks as there are; Lightning's default is one share per node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Share out whole weights and optimizer states; Lightning's own way stumbles over modules' extra state."""
        content = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)
        module = self.model
        assert module is not None
        own = dict(module.named_parameters())
        module.load_state_dict({name: _like(value, own.get(name)) for name, value in content["state_dict"].items()})
        for optimizer, state in zip(self.optimizers, content["optimizer_states"], strict=True):
            # strict=False: what a checkpoint has no state of begins with none
            options = StateDictOptions(full_state_dict=True, strict=False)
            named = keyed_by_name(state, cast("LanguageModelTask", module).model)
            set_optimizer_state_dict(module, optimizer, optim_state_dict=named, options=options)
        return content


def _like(value: Any, parameter: Any) -> Any:
    """Return a whole tensor as this rank's share of it, where the parameter is shared out."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def shard(task: LightningModule, model: nn.Module) -> None:
    """Share out a model's weights, each branch of its layers by itself, where the trainer's strategy asks for it."""
    if not isinstance(task.trainer.strategy, ModelParallelStrategy):
        return
    mesh = task.device_mesh
    assert mesh is not None
    for module in list(model.modules()):
        if isinstance(module, Branch):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")  # what objectives call


def check_sharding(trainer: Trainer, model: nn.Module, optimizer: Optimizer, callbacks: Sequence[Callback]) -> None:
    """Refuse what needs whole weights, where each process holds a share of them.

    Raises:
        ValueError: in one line, with what to choose instead.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    for found, problem in (
        (isinstance(optimizer, Together), "optimizer=muon needs whole matrices: choose optimizer=adamw"),
        (any(isinstance(m, Reversible) for m in _residuals(model)), "model.reversible=true keeps no graph to share"),
        (
            any(isinstance(c, WeightAverage) for c in callbacks),
            "callbacks.ema.decay needs whole weights: set it to null",
        ),
    ):
        if found:
            raise ValueError(f"trainer.strategy=fsdp: {problem}, or trainer=ddp")


def _residuals(model: nn.Module) -> Iterator[Any]:
    return (module.residual for module in model.modules() if "residual" in vars(module))


def without_samples(trainer: Trainer, callbacks: list[Callback]) -> list[Callback]:
    """Leave samples out where no process could write one: each holds a share of the weights."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return callbacks
    return [callback for callback in callbacks if not isinstance(callback, Samples)]


class OneRun(Callback):
    """Make all ranks one run: the folder is the first one's, and they go on from the same checkpoint.

    Args:
        room: the run's folder.
        saving: what saves there.
        resumed: what this rank goes on from: path and step, as plain text.
    """

    def __init__(self, room: "RunFolder", saving: Checkpoints, *, resumed: str) -> None:
        self.room = room
        self.saving = saving
        self.resumed = resumed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follow the first rank.

        Raises:
            RuntimeError: where this rank has found another checkpoint.
        """
        path, resumed = trainer.strategy.broadcast((str(self.room.path), self.resumed))
        if resumed != self.resumed:
            raise RuntimeError(f"rank {trainer.global_rank} goes on from {self.resumed}, the first one from {resumed}")
        if not trainer.is_global_zero:
            self.room.path = Path(path)
            self.saving.folder = self.room.checkpoints
            for callback in cast(Any, trainer).callbacks:
                if isinstance(callback, RunCallback):
                    callback.join(callback.run._replace(folder=self.room.path))


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
