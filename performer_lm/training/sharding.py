"""Weights shared out over processes (FSDP2): each holds a part of every one.

Layers come together as they run; a checkpoint holds whole weights, and opens with any number of processes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from performer_lm.nn.branch import Branch
from performer_lm.nn.reversible import Reversible
from performer_lm.training.callbacks.base import TrainingTask
from performer_lm.training.callbacks.ema import WeightAverage
from performer_lm.training.callbacks.samples import Samples
from performer_lm.training.carrying import keyed_by_name
from performer_lm.training.optim import Together


class ShardedStrategy(ModelParallelStrategy):
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
            named = keyed_by_name(state, cast(TrainingTask, module).model)
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
    """Refuse options that need whole weights, where each process holds a share of them.

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
