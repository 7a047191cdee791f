"""The attention backend that a checkpoint's model is opened with: its own, its own with other options, or another."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

from performer_lm.attention.base import AttentionFactory
from performer_lm.building import TARGET

FAVOR: Final = "performer_lm.attention.favor.FavorAttention"
OTHER_KERNELS: Final = tuple(
    f"performer_lm.attention.kernel_maps.{name}" for name in ("GeneralizedFeatures", "IdentityFeatures")
)
"""Features by which FAVOR is not attn=favor, but attn=relu or attn=linear."""


def typed_paths(overrides: Sequence[str], *sections: str) -> list[str]:
    """Return the keys below sections that were set or chosen, as dotted paths; a section itself, where it was."""
    keys = (override.partition("=")[0].lstrip("+~").partition("@") for override in overrides)
    paths = [(package or group).replace("/", ".") for group, _, package in keys]
    return [path for path in paths if any(path == section or path.startswith(f"{section}.") for section in sections)]


def with_backend(
    section: Mapping[str, Any],
    attn: Mapping[str, Any] | AttentionFactory,
    *,
    typed: Sequence[str] | None = None,
    source: object = "the checkpoint",
) -> dict[str, Any]:
    """Return a model's section with a backend in each of its stacks.

    Args:
        section: of a model.
        attn: the backend's section, or a factory.
        typed: paths of the options of `attn` that were typed, `attn` itself where the backend was: a stack that has
            this backend, or none was typed, keeps its own options but for those. None: all of `attn` counts.
        source: what the section is of, for messages.

    Raises:
        ValueError: for options that were typed without a backend, and that the stack's has not.
    """
    found = {
        name: with_backend(value, attn, typed=typed, source=source) if isinstance(value, Mapping) else value
        for name, value in section.items()
    }
    if "attn" in section:
        found["attn"] = attn if typed is None else _with_typed(section["attn"], attn, typed, source)
    return found


def set_path(path: Sequence[str], wanted: Mapping[str, Any], section: dict[str, Any]) -> None:
    """Set the value at a path to the wanted one; a path that is not wanted is removed."""
    name, *rest = path
    if name not in wanted:
        section.pop(name, None)
    elif rest and isinstance(wanted[name], Mapping):
        inner = section.get(name)
        section[name] = dict(inner) if isinstance(inner, Mapping) else {}
        set_path(rest, wanted[name], section[name])
    else:
        section[name] = wanted[name]


def _with_typed(own: Any, attn: Any, typed: Sequence[str], source: object) -> Any:
    own = own if isinstance(own, Mapping) else {}
    is_same_class = own.get(TARGET) == attn.get(TARGET)
    if "attn" in typed and not (is_same_class and _other_kernel(own) == _other_kernel(attn)):
        return attn
    unknown = [path for path in typed if path != "attn" and path.split(".")[1] not in own]
    if unknown and not is_same_class:
        wanted, found = (str(each.get(TARGET)).rpartition(".")[2] for each in (attn, own))
        raise ValueError(f"{unknown[0]} is of {wanted}, and {source} has {found}: type attn= as well")
    chosen = deepcopy(dict(own))
    if isinstance(chosen.get("backends"), dict):  # a version may offer others besides
        chosen["backends"] = {**attn.get("backends", {}), **chosen["backends"]}
    for path in typed:
        if path != "attn":
            set_path(path.split(".")[1:], attn, chosen)
    return chosen


def _other_kernel(attn: Mapping[str, Any]) -> Any:
    """Return the features that give a backend its name; None where its class does."""
    features = attn.get("features")
    name = features.get(TARGET) if isinstance(features, Mapping) else None
    return name if attn.get(TARGET) == FAVOR and name in OTHER_KERNELS else None
