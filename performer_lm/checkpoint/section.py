"""What a checkpoint says of its model and tokenizer, and how a section of a config is built."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from performer_lm import building
from performer_lm.checkpoint.contents import FORMAT
from performer_lm.data.tokenizer import Tokenizer

BUILDABLE = (
    "performer_lm.model",
    "performer_lm.performer",
    "performer_lm.encoder_decoder",
    "performer_lm.nn.",
    "performer_lm.attention.",
)


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
