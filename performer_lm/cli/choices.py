"""What is wrong with the overrides that choose a file of a config group: `attn=falsh`, `attn/features=optimal`."""

from collections.abc import Iterator, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, QuotedString
from omegaconf import DictConfig

from performer_lm.cli.errors import did_you_mean


def is_choice(loader: ConfigLoaderImpl, override: Override) -> bool:
    """Tell whether an override chooses a file, rather than setting a key."""
    return loader.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)


def options(loader: ConfigLoaderImpl, group: str) -> list[str]:
    """Return the files of a group that are for users to choose."""
    names = loader.repository.get_group_options(group, ObjectType.CONFIG)
    return [name for name in names if not name.startswith("_")]


def no_choice(key: str, name: str, names: Sequence[str]) -> str:
    """Return the line for a file that is not there."""
    nearest = did_you_mean(name, names, prefix=f"{key}=")
    return f"{key}={name}: no such choice{nearest} (choices: {', '.join(names)})"


def wrong_choices(loader: ConfigLoaderImpl, override: Override) -> Iterator[str]:
    """Yield a problem for each file that an override names and that is not there."""
    group = override.key_or_group
    if override.is_delete() and override.value() is None:
        return
    values: list[Any] = [override.value()]
    if override.is_sweep_override():
        values = list(override.sweep_iterator()) if override.is_discrete_sweep() else []
    for value in values:
        for name in value if isinstance(value, list) else [value]:
            text = "null" if name is None else _text(name)
            if not loader.repository.config_exists(f"{group}/{text}"):
                yield no_choice(override.get_key_element(), text, options(loader, group))


def misplaced(loader: ConfigLoaderImpl, override: Override, base: DictConfig) -> str | None:
    """Return why nothing in `base`, composed without it, has the group that an override chooses from; None if it has.

    A group inside another belongs to some of its files: `attn/features` to attn=favor, not to attn=flash.
    """
    group = override.key_or_group
    chosen = {str(key): str(name) for key, name in base.hydra.runtime.choices.items()}
    if override.is_add() or override.get_key_element().lstrip("~") in chosen:
        return None
    places = [key for key in chosen if key.partition("@")[0] == group]
    if places:
        return f"{override.input_line}: say where: {' or '.join(f'{place}=...' for place in places)}"
    parent, _, name = group.rpartition("/")
    having = [each for each in options(loader, parent) if parent and _has_group(loader, f"{parent}/{each}", name)]
    hint = f"; with one: {', '.join(f'{parent}={each}' for each in having)}" if having else ""
    owner = f"{parent}={chosen[parent]}" if parent in chosen else "what was chosen"
    return f"{override.input_line}: {owner} has no {group} to choose{hint}"


def dotted_choice(loader: ConfigLoaderImpl, override: Override) -> str | None:
    """Return a problem for a file chosen as if it were a value, `model.norm=layer`; None for anything else."""
    key, value = override.key_or_group, override.value()
    group = key.replace(".", "/")
    plain = isinstance(value, str | int | float | QuotedString) and not _text(value).startswith("${")
    if "." not in key or not plain or override.is_delete() or not loader.repository.group_exists(group):
        return None
    names = options(loader, group)
    if _text(value) in names:
        return f"{override.input_line}: choices are made with a slash; did you mean {group}={_text(value)}?"
    return no_choice(group, _text(value), names)


def _text(value: Any) -> str:
    return str(getattr(value, "text", value))


def _has_group(loader: ConfigLoaderImpl, path: str, name: str) -> bool:
    """Tell whether a config file's own list of defaults makes a choice called `name`, itself or by another file."""
    found = loader.repository.load_config(path)
    group, _, _ = path.rpartition("/")
    for default in (found.defaults_list or []) if found else []:
        if getattr(default, "group", None) in (name, f"override {name}"):
            return True
        inner = getattr(default, "path", None)
        if isinstance(inner, str) and inner != "_self_" and _has_group(loader, f"{group}/{inner}", name):
            return True
    return False
