"""What a checkpoint says of its model and tokenizer, and how they are rebuilt from it."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from performer_lm import building
from performer_lm.checkpoint.files import FORMAT, Checkpoint
from performer_lm.data.tokenizer import Tokenizer, tokenizer_from_dict
from performer_lm.language_model import LanguageModel
from performer_lm.objectives import MaskedTokens, NextToken, Objective, SourceToTarget

BUILDABLE = (
    "performer_lm.model",
    "performer_lm.performer",
    "performer_lm.encoder_decoder",
    "performer_lm.nn.",
    "performer_lm.attention.",
)
OBJECTIVES: dict[str, type[Objective]] = {
    f"performer_lm.objectives.{each.__name__}": each for each in (NextToken, MaskedTokens, SourceToTarget)
}
BACKEND = ".backend."  # keys of what a backend owns: it may change between saving and opening


def describe(
    *,
    model: Mapping[str, Any],
    tokenizer: Tokenizer,
    fingerprint: Mapping[str, Any],
    seed: int,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the plain-data section that makes a file enough to rebuild model and tokenizer, and to know its run."""
    return {
        "format": FORMAT,
        "model": dict(model),
        "tokenizer": tokenizer.to_dict(),
        "fingerprint": dict(fingerprint),
        "seed": seed,
        "training": dict(training or {}),
    }


def build(section: Any) -> Any:
    """Build what a plain config section names: `_target_` called with the rest, or a factory where `_partial_`.

    Raises:
        ValueError: for a target that is not a model class defined in this package, or values that its constructor
            refuses.
    """
    try:
        return building.build(section, find=_find_class)
    except TypeError as error:
        raise ValueError(str(error).partition("\n")[0]) from error


def _find_class(name: object) -> Callable[..., nn.Module]:
    """Return the class that a dotted name stands for, if this package defines it as part of a model."""
    refusal = ValueError(f"{name!r} is not a model class of performer_lm, so it is not built")
    module_name, _, class_name = str(name).rpartition(".")
    if not f"{module_name}.".startswith(tuple(f"{allowed.rstrip('.')}." for allowed in BUILDABLE)):
        raise refusal
    try:
        found = getattr(import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise refusal from None
        raise
    if not isinstance(found, type) or not issubclass(found, nn.Module) or found.__module__ != module_name:
        raise refusal
    return found


def open_model(checkpoint: Checkpoint, *, attn: Mapping[str, Any] | None = None) -> tuple[LanguageModel, Tokenizer]:
    """Rebuild model and tokenizer from a checkpoint, on the CPU, in evaluation mode.

    Args:
        checkpoint: of `read`.
        attn: a plain config section of another attention backend; None for the one it was trained with.

    Raises:
        ValueError: for weights that do not fit the model that the file describes.
    """
    section = checkpoint.section["model"] if attn is None else _with_backend(checkpoint.section["model"], attn)
    source = str(checkpoint.path)
    _check_depth(section, checkpoint)
    with torch.device("meta"):  # sizes first, memory later
        checked = build(section)
    if not isinstance(checked, LanguageModel):
        raise ValueError(f"{source} describes {type(checked).__name__}, which is no language model")
    weights = checkpoint.weights
    if attn is None:
        check_fit(checked, weights, source=source)
        _check_size(checked, checkpoint)
    else:
        weights = _without_unfit(weights, checked)
        check_fit(checked, weights, source=source)
    model = cast(LanguageModel, build(section))
    model.redraw(int(checkpoint.content.get("global_step", 0)))
    load_weights(model, weights, source=source)
    return model.eval(), tokenizer_from_dict(checkpoint.section["tokenizer"])


def open_objective(checkpoint: Checkpoint, model: LanguageModel, tokenizer: Tokenizer) -> Objective:
    """Return what a checkpoint's model was trained to predict; next tokens where the file does not say.

    Raises:
        ValueError: for an objective that is none of this package's, or that does not fit the model.
    """
    training = checkpoint.section.get("training") or {}
    section = dict(training.get("objective") or {"_target_": next(iter(OBJECTIVES)), "chunk_size": None})
    name = section.pop("_target_", None)
    if name not in OBJECTIVES:
        raise ValueError(f"{checkpoint.path} was trained on {name!r}, which is no objective of performer_lm")
    try:
        objective = OBJECTIVES[name](**section)
    except TypeError as error:
        raise ValueError(f"{checkpoint.path}: {name}: {error}") from error
    objective.check(model, packed=False, answers=False)
    objective.adopt(tokenizer)
    return objective


def _with_backend(section: Mapping[str, Any], attn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's section with another backend in each of its stacks."""
    found = {
        name: _with_backend(value, attn) if isinstance(value, Mapping) else value for name, value in section.items()
    }
    return {**found, "attn": attn} if "attn" in section else found


def _without_unfit(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights but for what the backend owned in another shape: it was asked for other features."""
    own = model.state_dict()
    is_other = {name for name in weights if BACKEND in name and name in own and weights[name].shape != own[name].shape}
    return {name: value for name, value in weights.items() if name not in is_other}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights strictly, but for what the attention backend itself owns: that may have changed.

    Prints a line where backend weights were left out or kept at their initial values.

    Raises:
        ValueError: naming the first key or shape that does not fit.
    """
    check_fit(model, weights, source=source)
    own = model.state_dict()
    kept = {name: value for name, value in weights.items() if name in own}
    drawn = {name: value for name, value in own.items() if name not in weights}
    model.load_state_dict({**kept, **drawn})
    dropped = len(weights) - len(kept)
    if dropped or drawn:
        print(f"note: the attention backend changed: {dropped} of its tensors left out, {len(drawn)} drawn anew")


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Raise ValueError for the first weight that is missing, unknown or of another shape, a backend's own left aside.

    The model may be on the meta device.
    """
    own = model.state_dict()
    for name, value in own.items():
        if name not in weights:
            problem = "" if BACKEND in name else f"it has no {name}"
        else:
            shapes = tuple(weights[name].shape), tuple(value.shape)
            problem = f"size mismatch for {name}: {shapes[0]} in the file, {shapes[1]} in the model"
            problem = problem if shapes[0] != shapes[1] else ""
        if problem:
            raise ValueError(f"{source} does not fit the model: {problem}")
    unknown = [name for name in weights if name not in own and BACKEND not in name]
    if unknown:
        raise ValueError(f"{source} does not fit the model: it has {unknown[0]}, which the model has not")


def _check_depth(section: Any, checkpoint: Checkpoint) -> None:
    """Refuse more layers than the file has tensors: even without memory, building them would never end."""
    if isinstance(section, Mapping):
        for name, value in section.items():
            if "depth" in str(name) and isinstance(value, int) and value > len(checkpoint.weights):
                raise ValueError(
                    f"{checkpoint.path} does not fit the model: {name} is {value}, but it holds only "
                    f"{len(checkpoint.weights)} tensors"
                )
            _check_depth(value, checkpoint)


def _check_size(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse a model with many more numbers than the file: what it lacks would be drawn, at any declared size."""
    declared = sum(value.numel() for value in model.state_dict().values())
    held = sum(value.numel() for value in checkpoint.weights.values())
    if declared > 2 * held:
        raise ValueError(
            f"{checkpoint.path} does not fit the model: it describes {declared:,} numbers and holds {held:,}"
        )
