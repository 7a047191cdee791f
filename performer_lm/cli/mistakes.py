"""The first override that is wrong, with the nearest right one.

Hydra stops at its first mistake and says it in its own words. This room is entered only after composition failed.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from performer_lm.building import PARTIAL, TARGET, resolve
from performer_lm.cli.argv import in_quotes
from performer_lm.cli.errors import nearest_key
from performer_lm.cli.loading import COMPOSITION_ERRORS, Loader, no_choice
from performer_lm.cli.schema import parameters


def first_mistake(loader: Loader, overrides: Sequence[str], error: Exception, *, multirun: bool) -> str:
    """Return what is wrong with the first wrong override, in one line; or else what `error` says.

    Choices are looked at before keys: they decide which keys there are.
    """
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed += loader.parse([text])
        except HydraException as failure:
            return _syntax(text, failure)
        if parsed[-1].is_sweep_override() and not multirun:
            return f"{text}: several values need -m (or --multirun)"
    choices = [override for override in parsed if loader.is_choice(override)]
    chosen: list[str] = []
    for override in sorted(choices, key=lambda override: override.key_or_group.count("/")):
        if problem := _wrong_choice(loader, override, chosen):
            return problem
        chosen.append(str(override.input_line))
    settings = [override for override in parsed if not loader.is_choice(override)]
    try:
        base = loader.load(chosen)
    except COMPOSITION_ERRORS as failure:
        return in_one_line(failure)
    for override in settings:
        if problem := _wrong_key(override, base, loader):
            return problem
    for override in settings:
        try:
            loader.load([*chosen, str(override.input_line)])
        except COMPOSITION_ERRORS as failure:
            return f"{override.input_line}: {in_one_line(failure.__cause__ or failure)}"
    return in_one_line(error)


def dotted_choice(loader: Loader, override: Override) -> str | None:
    """Return a problem for a file chosen as if it were a value, `model.norm=layer`; None for anything else."""
    key, value = override.key_or_group, override.value()
    group = key.replace(".", "/")
    if "." not in key or not isinstance(value, str | int | float) or not (names := loader.options(group)):
        return None
    if str(value) in names:
        return f"{override.input_line}: choices are made with a slash; did you mean {group}={value}?"
    return no_choice(group, str(value), names)


def in_one_line(error: BaseException) -> str:
    """Return what an error and its cause say, on one line, without Hydra's list of search paths."""
    if isinstance(error, RecursionError):
        return "config files that include each other, or themselves, have no end"
    texts = [_in_words(str(link)) for link in (error, error.__cause__) if link is not None]
    return ": ".join(text for text in texts if text) or type(error).__name__


def _in_words(text: str) -> str:
    """Return an error's words without search paths, node types and parser states, which only its library can use."""
    told = text.partition("\nConfig search path")[0].splitlines()
    kept = [line for line in told if not line.strip().startswith(("full_key:", "object_type=", "reference_type="))]
    words = " ".join(" ".join(kept).split())
    if words.startswith(("no viable alternative", "token recognition error", "mismatched input", "extraneous input")):
        return (
            rf"`${{` begins an interpolation, and this one does not end well; for the characters write \${{ ({words})"
        )
    return words


def _syntax(text: str, error: HydraException) -> str:
    if "=" not in text and not text.startswith("~"):
        return f"{text}: wanted key=value"
    reason = [line for line in str(error).splitlines() if not line.startswith(("See ", "Error parsing override"))]
    said = " ".join(" ".join(reason).split()).partition("Exception: ")[0]
    key, _, value = text.partition("=")
    quoted = f"{key}={in_quotes(value)}"
    typed = shlex.quote(quoted) if set('"$`!\\') & set(quoted) else f'"{quoted}"'
    return f"{text}: not a valid override ({said}); to give it as text write {typed}"


def _wrong_choice(loader: Loader, override: Override, chosen: Sequence[str]) -> str | None:
    """Return why a file cannot be chosen, beside those chosen already; None if it can."""
    group, line, value = override.key_or_group, str(override.input_line), override.value()
    values: Any = [value]
    if override.is_sweep_override():
        values = list(override.sweep_iterator()) if override.is_discrete_sweep() else []
    named = [getattr(name, "text", name) for each in values for name in (each if isinstance(each, list) else [each])]
    for name in named:
        if name is not None and str(name) not in (names := loader.options(group)):
            return no_choice(override.get_key_element(), str(name), names)
    try:
        before = loader.choices(chosen)
        loader.load([*chosen, line])
    except COMPOSITION_ERRORS as error:
        return _misplaced(loader, override, before) or f"{line}: {in_one_line(error)}"
    return None


def _misplaced(loader: Loader, override: Override, chosen: dict[str, str]) -> str | None:
    """Return why nothing of what was chosen has the group that an override chooses from; None if it has.

    A group inside another belongs to some of its files: `attn/features` to attn=favor, not to attn=flash.
    """
    group, line = override.key_or_group, override.input_line
    if override.value() is None and not override.is_delete():
        return no_choice(group, "null", loader.options(group))
    if override.is_add() or override.get_key_element().lstrip("~") in chosen:
        return None
    places = [key for key in chosen if key.partition("@")[0] == group]
    if places:
        return f"{line}: say where: {' or '.join(f'{place}=...' for place in places)}"
    parent = group.rpartition("/")[0]
    if not parent:
        return f"{line}: to choose none write {group}=[]"
    having = [each for each in loader.options(parent) if parent and group in loader.choices([f"{parent}={each}"])]
    hint = f"; with one: {', '.join(f'{parent}={each}' for each in having)}" if having else ""
    owner = f"{parent}={chosen[parent]}" if parent in chosen else "what was chosen"
    return f"{line}: {owner} has no {group} to choose{hint}"


def _wrong_key(override: Override, base: DictConfig, loader: Loader) -> str | None:
    key, line = override.key_or_group, str(override.input_line)
    parent, name = _split(base, key)
    if override.is_add():
        if name == "" and not OmegaConf.is_config(_at(base, key)):
            return f"{line}: {key} is in the config already; write {line.lstrip('+')}"
    elif name != "" and not override.is_force_add():
        groups = [] if parent else loader.options("", kind=ObjectType.GROUP)
        return f"{'~' * override.is_delete()}{key}: {_unknown(base, groups, parent=parent, name=name, key=key)}"
    elif isinstance(_at(base, key), DictConfig) and isinstance(override.value(), list) and not override.is_delete():
        return f"{line}: wanted a section (key=value pairs below {key}), got a list"
    return dotted_choice(loader, override)


def _at(cfg: DictConfig, path: str) -> Any:
    return OmegaConf.select(cfg, path, throw_on_missing=False) if path else cfg


def _split(cfg: DictConfig, key: str) -> tuple[str, str]:
    """Split `key` where the config ends: `model.dmi` -> `("model", "dmi")`; `("model.dim", "")` if it is all there."""
    path = ""
    for name in key.split("."):
        section = _at(cfg, path)
        if not (name in map(str, section) if isinstance(section, DictConfig) else name.isdigit()):
            return path, name
        path = f"{path}.{name}" if path else name
    return path, ""


def _unknown(base: DictConfig, groups: Sequence[str], *, parent: str, name: str, key: str) -> str:
    section = _at(base, parent)
    prefix = f"{parent}." if parent else ""
    accepted: list[str] = []
    if isinstance(section, DictConfig) and isinstance(section.get(TARGET), str):
        with suppress(ValueError):  # refused where it stands
            accepted = list(parameters(resolve(section[TARGET])))
    if key == prefix + name and name in accepted:
        return f"not set in the config; to add it write +{key}=..."
    same = [path for path in _keys(base, "") if path.rpartition(".")[2] == key and not path.startswith("hydra.")]
    if len(same) == 1:  # lr -> optimizer.lr
        return f"unknown key; did you mean {same[0]}?"
    names = [str(other) for other in section] if isinstance(section, DictConfig) else []
    known = sorted({*names, *groups, *accepted} - {"hydra", TARGET, PARTIAL})
    below = key.removeprefix(prefix + name)
    whole = [other + below for other in known if not below or _split(base, prefix + other + below)[1] == ""]
    return f"unknown key{nearest_key(name + below, whole or known, prefix=prefix)}"


def _keys(cfg: DictConfig, prefix: str) -> Iterator[str]:
    for name in map(str, cfg):
        yield f"{prefix}{name}"
        if not OmegaConf.is_missing(cfg, name) and not OmegaConf.is_interpolation(cfg, name):
            value = cfg[name]
            if isinstance(value, DictConfig):
                yield from _keys(value, f"{prefix}{name}.")
