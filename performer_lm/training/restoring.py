"""Checks of a checkpoint's training state, before the run's folder is touched.

A trainer takes over whatever a file says and fails, or reads beyond its memory, wherever that first matters. So each
part is held against what this run itself would save: the same names, kinds and shapes.
"""

import copy
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from performer_lm.checkpoint import Checkpoint, check_fit
from performer_lm.training.optim import Together, parameter_groups
from performer_lm.training.task import LanguageModelTask
from performer_lm.wording import first_line, short

VERSION = re.compile(r"[2-9]\d*(\.\d+)*((a|b|rc|\.post|\.dev)\d+)?")


def check_state(resumed: Checkpoint, trainer: Trainer, task: LanguageModelTask, *, optimizer: bool) -> None:
    """Refuse a checkpoint whose training state is not of the kind of the run's own.

    Args:
        resumed: what the run goes on from.
        trainer: of the run.
        task: of the run.
        optimizer: whether the optimizer has to be the checkpoint's.

    Raises:
        ValueError: in one line, naming the first part that is missing or of another kind.
    """
    content = resumed.content
    weights = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
    check_fit(task.model, weights, source=str(resumed.path))
    try:
        _check_parts(content, trainer)
        _check_progress(content, trainer)
        for state in content.get("random", []):
            _check_random(state)
        if optimizer and not isinstance(trainer.strategy, ModelParallelStrategy):  # which saves names for numbers
            _check_optimizer(content, task, max_steps=int(trainer.max_steps))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(resumed, error) from error


def check_callbacks(resumed: Checkpoint, callbacks: Iterable[Callback]) -> None:
    """Refuse a checkpoint whose callbacks' states are not of the kind of these callbacks'.

    Raises:
        ValueError: in one line.
    """
    saved = resumed.content["callbacks"]
    for callback in callbacks:
        is_known = type(callback).__module__.startswith(("performer_lm.", "lightning."))
        if is_known and callback.state_key in saved:
            try:
                _compare(f"callbacks.{callback.state_key}", saved[callback.state_key], callback.state_dict())
            except ValueError as error:
                raise _refusal(resumed, error) from error


def _refusal(resumed: Checkpoint, error: Exception) -> ValueError:
    return ValueError(
        f"{resumed.path} holds no training state to go on from: {first_line(error)[:300]}; "
        f"to start a new run from its weights: init={resumed.path}"
    )


def _check_parts(content: Mapping[str, Any], trainer: Trainer) -> None:
    for name in ("global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers"):
        if name not in content:
            raise ValueError(f"it has no {name}")
    for name in ("optimizer_states", "lr_schedulers"):
        if len(content[name]) != 1:
            raise ValueError(f"its {name} are {len(content[name])}, and not one")
    version = content.get("pytorch-lightning_version")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise ValueError(f"its pytorch-lightning_version is {short(version)}")
    precision = trainer.precision_plugin
    if (name := type(precision).__qualname__) in content:
        _compare(name, content[name], precision.state_dict())


def _check_progress(content: Mapping[str, Any], trainer: Trainer) -> None:
    """Hold the trainer's counters against this one's, and against the step."""
    saved, own = content["loops"]["fit_loop"], trainer.fit_loop.state_dict()
    own |= {"state_dict": {"combined_loader": [{"done": 0, "accumulation": 1}]}}
    if content["pytorch-lightning_version"] != lightning.__version__:  # which may count other things, too
        own = {name: value for name, value in own.items() if name in saved}
    _compare("loops.fit_loop", saved, own)
    taken = saved["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if taken != content["global_step"]:
        raise ValueError(f"its loops have taken {short(taken)} steps, its global_step is {content['global_step']}")


def _check_random(state: Any) -> None:
    """Set generators of no one's to a state."""
    version, numbers, gauss = state["python"]
    random.Random().setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    if type(position) is not int or not 0 <= position <= 624:  # NumPy would read beyond its keys
        raise ValueError(f"its random state of numpy stands at {short(position)}")
    np.random.RandomState().set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.Generator().set_state(state["torch"])
    if not isinstance(state.get("device", state["torch"]), Tensor):
        raise ValueError(f"its random state of the device is {short(state['device'])}")


def _check_optimizer(content: Mapping[str, Any], task: LanguageModelTask, *, max_steps: int) -> None:
    """Load the states of optimizer and schedule into new ones, and hold these against themselves before."""
    optimizer = task.optimizer(parameter_groups(task.model, head=task.model.head))
    schedule, saved = LambdaLR(optimizer, task.schedule(max_steps)), content["lr_schedulers"][0]
    own = {name: value for name, value in schedule.state_dict().items() if name in ("base_lrs", "last_epoch", *saved)}
    _compare("lr_schedulers", saved, own)
    if unknown := [name for name in saved if name not in own and hasattr(schedule, str(name))]:
        raise ValueError(f"lr_schedulers has {short(unknown[0])}, which is none of its settings")
    kept = _states_after_a_step(task)
    states = content["optimizer_states"][0]
    for part, state in zip(
        _parts(optimizer), states["parts"] if isinstance(optimizer, Together) else [states], strict=True
    ):
        name = f"optimizer_states.{type(part).__name__}"
        groups = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
        part.load_state_dict(copy.copy(state))
        _compare(f"{name}.param_groups", part.param_groups, groups)
        for parameter, values in part.state.items():
            if not isinstance(parameter, Tensor):
                raise ValueError(f"{name}.state is of {short(parameter)}, which is no parameter")
            own = {key: parameter if is_shaped else value for key, (value, is_shaped) in kept[type(part)].items()}
            _compare(f"{name}.state", values, own)


def _states_after_a_step(task: LanguageModelTask) -> dict[type[Optimizer], dict[str, tuple[Any, bool]]]:
    """Return the state of a parameter by kind of optimizer and by name, and whether it has the parameter's shape."""
    optimizer = task.optimizer(parameter_groups(nn.Linear(3, 2), head=nn.Identity()))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found: dict[type[Optimizer], dict[str, tuple[Any, bool]]] = {}
    for part in _parts(optimizer):
        found[type(part)] = {
            name: (value, isinstance(value, Tensor) and value.numel() > 1)
            for kept in part.state.values()
            for name, value in kept.items()
        }
    return found


def _parts(optimizer: Optimizer) -> Sequence[Optimizer]:
    return optimizer.parts if isinstance(optimizer, Together) else [optimizer]


def _compare(name: str, saved: Any, own: Any) -> None:
    """Raise ValueError where a value is not of the kind of one's own; further names in dicts are left alone."""
    if isinstance(own, Tensor):
        fits = isinstance(saved, Tensor) and saved.shape == own.shape
        fits = fits and saved.is_floating_point() == own.is_floating_point()
    elif isinstance(own, dict):
        fits = isinstance(saved, dict) and own.keys() <= saved.keys()
    elif isinstance(own, list | tuple):
        fits = isinstance(saved, list | tuple) and len(saved) == len(own)
    elif own is None or isinstance(own, bool | str):
        fits = own is None or type(saved) is type(own)
    else:
        fits = type(saved) is int and saved >= 0 if type(own) is int else type(saved) in (int, float)
    if not fits:
        raise ValueError(f"{name} is {short(saved)}, and not of the kind of {short(own)}")
    if isinstance(own, dict):
        for key, value in own.items():
            _compare(f"{name}.{key}", saved[key], value)
    elif isinstance(own, list | tuple):
        for place, value in enumerate(own):
            _compare(f"{name}.{place}", saved[place], value)
