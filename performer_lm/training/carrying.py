"""State that a run keeps where its backend or its optimizer is another one than the checkpoint's.

Weights stay, but for what a backend owns: that is left out or drawn anew. Of an optimizer's state stays what belongs to
parameters that stay; another optimizer begins with none.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from performer_lm.building import build_model
from performer_lm.checkpoint import AVERAGES, Checkpoint
from performer_lm.checkpoint.opening import BACKEND, fit_backend
from performer_lm.language_model import LanguageModel
from performer_lm.training.optim import DECAYS, MATRICES, parameter_groups

PREFIX = "model."  # of the names of weights in a trainer's own part of a checkpoint


def carry_over(
    resumed: Checkpoint,
    model: LanguageModel,
    optimizer: Callable[..., Optimizer],
    section: Mapping[str, Any],
    *,
    is_allowed: bool,
) -> list[str]:
    """Fit weights, averages and optimizer states of a checkpoint, in place, to the run that goes on with it.

    Args:
        resumed: whose content is changed.
        model: of the run.
        optimizer: of `LanguageModelTask`.
        section: of the checkpoints of the run.
        is_allowed: whether anything may have changed; else the optimizer is left alone.

    Returns:
        A line for each part that starts anew.

    Raises:
        ValueError: for a weight that does not fit.
    """
    lines = _carry_weights(resumed, model)
    if is_allowed:
        names = [each.get("training", {}).get("optimizer", {}).get("_target_") for each in (resumed.section, section)]
        own = optimizer(parameter_groups(model, head=model.head))
        lines += _carry_optimizer(resumed, model, own, is_other=names[0] != names[1])
    return lines


def _carry_weights(resumed: Checkpoint, model: nn.Module) -> list[str]:
    content, source = resumed.content, str(resumed.path)
    saved = {str(name).removeprefix(PREFIX): value for name, value in content["state_dict"].items()}
    weights, lines = fit_backend(saved, model, source=source)
    if lines:
        content["state_dict"] = {f"{PREFIX}{name}": value for name, value in weights.items()}
        if AVERAGES in content:
            parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
            averages, _ = fit_backend({**weights, **content[AVERAGES]}, model, source=source)
            content[AVERAGES] = {name: value for name, value in averages.items() if name in parameters}
    return lines


def _carry_optimizer(resumed: Checkpoint, model: LanguageModel, optimizer: Optimizer, *, is_other: bool) -> list[str]:
    content = resumed.content
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # as a schedule sets it
    fresh = optimizer.state_dict()
    new = [_named(part, model) for part in _parts(fresh)]
    with torch.device("meta"):
        before: LanguageModel = build_model(resumed.section["model"])
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in before.named_parameters():
        if BACKEND not in name:  # of its own a backend decides itself
            parameter.requires_grad_(learns.get(name, True))
    old = [_named(part, before) for part in _parts(content["optimizer_states"][0])]
    known = {} if is_other else {name: state for part in old for name, state in part.items()}
    parameters = dict(model.named_parameters())
    stays = {name for part in new for name in part if _fits(known.get(name), parameters[name])}
    total = sum(len(part) for part in new)
    if len(stays) == total and [list(names) for names in old] == [list(names) for names in new]:
        return []
    for part, names in zip(_parts(fresh), new, strict=True):
        part["state"].update({index: known[name] for index, name in enumerate(names) if name in stays})
    content["optimizer_states"] = [fresh]
    content["lr_schedulers"] = [_for_groups(state, optimizer) for state in content["lr_schedulers"]]
    anew = total - len(stays)
    return [f"the optimizer starts anew on {anew} of {total} parameters"] if anew else []


def _fits(state: Mapping[str, Any] | None, parameter: Tensor) -> bool:
    """Return True for the state of a parameter of this shape: tensors like it, and counts; or nothing yet."""
    return state is not None and all(value.shape in (parameter.shape, ()) for value in state.values())


def _parts(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the states of an optimizer's parts; most have one."""
    return list(state.get("parts", [state]))


def keyed_by_name(state: Mapping[str, Any], model: LanguageModel) -> dict[str, Any]:
    """Return an optimizer's state with parameters by their names in a `LanguageModelTask`, not by their numbers."""
    groups = [{**group, "params": [f"{PREFIX}{name}" for name in names]} for group, names in _groups(state, model)]
    known = {f"{PREFIX}{name}": found for name, found in _named(state, model).items() if found}
    return {"state": known, "param_groups": groups}


def _named(state: Mapping[str, Any], model: LanguageModel) -> dict[str, dict[str, Any]]:
    """Return the state of each parameter by its name, in the optimizer's order."""
    pairs = [pair for group, names in _groups(state, model) for pair in zip(names, group["params"], strict=True)]
    return {name: state["state"].get(number, {}) for name, number in pairs}


def _groups(state: Mapping[str, Any], model: LanguageModel) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield an optimizer's groups of parameters, and the parameters' names."""
    groups = {(group[DECAYS], group[MATRICES]): group for group in parameter_groups(model, head=model.head)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in state["param_groups"]:
        if MATRICES in group:  # one without is a stand-in for parameters that the model has not
            yield group, [names[id(parameter)] for parameter in groups[group[DECAYS], group[MATRICES]]["params"]]


def _for_groups(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a schedule's state, which is its step, for the groups of another optimizer."""
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    return {**state, "base_lrs": rates, "_last_lr": rates, "lr_lambdas": [None] * len(rates)}
