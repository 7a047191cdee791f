"""The first override that is wrong, with the nearest right one.

Hydra stops at its first mistake and says it in its own words. Overrides are looked at here only after one has failed.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from performer_lm.annotations import leaves
from performer_lm.building import PARTIAL, TARGET, parameters, resolve
from performer_lm.cli.argv import in_quotes
from performer_lm.cli.errors import UsageError
from performer_lm.cli.loading import COMPOSITION_ERRORS, Loader, no_choice
from performer_lm.wording import nearest_key


@contextmanager
def explaining(loader: Loader, overrides: Sequence[str], *, multirun: bool) -> Iterator[None]:
    """Turn the errors of Hydra for overrides that do not compose into a `UsageError` for the first wrong one."""
    try:
        yield
    except UsageError:
        raise
    except COMPOSITION_ERRORS as error:
        try:
            problem = next(_mistakes(loader, overrides, multirun=multirun), in_one_line(error))
        except COMPOSITION_ERRORS as failure:  # of a config file, whatever was typed
            problem = in_one_line(failure)
        raise UsageError(problem) from error


def meant_as_choices(loader: Loader, overrides: Sequence[str]) -> list[str]:
    """Return a problem for each override that Hydra takes for a value and its user means as a choice."""
    problems = (dotted_choice(loader, override) for override in loader.parse(overrides))
    return [problem for problem in problems if problem]


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
    """Return the text of an error and of its cause, without search paths, node types and the like."""
    if isinstance(error, RecursionError):
        return "config files that include each other, or themselves, have no end"
    texts = [str(link).partition("\nConfig search path")[0] for link in (error, error.__cause__) if link is not None]
    own = ("full_key:", "object_type=", "reference_type=")
    kept = [" ".join(line for line in text.splitlines() if not line.strip().startswith(own)) for text in texts]
    words = ": ".join(" ".join(text.split()) for text in kept if text)
    if words.startswith(("no viable alternative", "token recognition error", "mismatched input", "extraneous input")):
        told = r"`${` begins an interpolation, and this one does not end well; for the characters write \${"
        return f"{told} ({words})"
    return words or type(error).__name__


def _mistakes(loader: Loader, overrides: Sequence[str], *, multirun: bool) -> Iterator[str]:
    """Yield the problem of each wrong override; of choices before keys, for they decide which keys there are."""
    choices, settings = list[Override](), list[Override]()
    for text in overrides:
        try:
            [override] = loader.parse([text])
        except HydraException as failure:
            yield _syntax(text, failure)
            continue
        if override.is_sweep_override() and not multirun:
            yield f"{text}: several values need -m (or --multirun)"
        (choices if loader.is_choice(override) else settings).append(override)
    chosen: list[str] = []
    base = loader.load(chosen)
    for override in sorted(choices, key=lambda override: override.key_or_group.count("/")):
        yield from _not_among_choices(loader, override)
        try:
            base = loader.load([*chosen, str(override.input_line)])
        except COMPOSITION_ERRORS as failure:
            yield _misplaced(loader, override, loader.choices(chosen)) or _told(override, failure)
        chosen.append(str(override.input_line))
    for override in settings:
        if problem := _wrong_key(override, base, loader, chosen):
            yield problem
    for override in settings:
        try:
            loader.load([*chosen, str(override.input_line)])
        except COMPOSITION_ERRORS as failure:
            yield _told(override, failure.__cause__ or failure)


def _told(override: Override, failure: BaseException) -> str:
    return f"{override.input_line}: {in_one_line(failure)}"


def _syntax(text: str, error: HydraException) -> str:
    if "=" not in text and not text.startswith("~"):
        return f"{text}: wanted key=value"
    reason = [line for line in str(error).splitlines() if not line.startswith(("See ", "Error parsing override"))]
    said = " ".join(" ".join(reason).split()).partition("Exception: ")[0]
    key, _, value = text.partition("=")
    quoted = f"{key}={in_quotes(value)}"
    typed = shlex.quote(quoted) if set('"$`!\\') & set(quoted) else f'"{quoted}"'
    return f"{text}: not a valid override ({said}); to give it as text write {typed}"


def _not_among_choices(loader: Loader, override: Override) -> Iterator[str]:
    """Yield a problem for each file that an override names and its group has not."""
    names, value = loader.options(override.key_or_group), override.value()
    if override.is_sweep_override():
        value = list(override.sweep_iterator()) if override.is_discrete_sweep() else []
    for _, name in leaves(value, ""):
        text = str(getattr(name, "text", name))
        if name not in (None, []) and text not in names:
            yield no_choice(override.get_key_element(), text, names)


def _misplaced(loader: Loader, override: Override, chosen: dict[str, str]) -> str | None:
    """Return why nothing of what was chosen has the group that an override chooses from; None if it has.

    A group inside another belongs to some of its files: `attn/features` to attn=favor, not to attn=flash.
    """
    group, line = override.key_or_group, override.input_line
    parent = group.rpartition("/")[0]
    if override.value() is None and not override.is_delete():
        return no_choice(group, "null", loader.options(group))
    if override.is_add() or override.get_key_element().lstrip("~") in chosen:
        return None
    if places := [key for key in chosen if key.partition("@")[0] == group]:
        return f"{line}: say where: {' or '.join(f'{place}=...' for place in places)}"
    if not parent:
        return f"{line}: to choose none write {group}=[]"
    having = [f"{parent}={each}" for each in loader.options(parent) if group in loader.choices([f"{parent}={each}"])]
    owner = f"{parent}={chosen[parent]}" if parent in chosen else "what was chosen"
    hint = f"; with one: {', '.join(having)}" if having else ""
    return f"{line}: {owner} has no {group} to choose{hint}"


def _wrong_key(override: Override, base: DictConfig, loader: Loader, chosen: Sequence[str]) -> str | None:
    key, line = override.key_or_group, str(override.input_line)
    parent, name = _split(base, key)
    if override.is_add() and not name and not OmegaConf.is_config(_at(base, key)):
        return f"{line}: {key} is in the config already; write {line.lstrip('+')}"
    if name and not override.is_add() and not override.is_force_add():
        groups = [] if parent else loader.options("", kind=ObjectType.GROUP)
        problem = _unknown(base, groups, parent=parent, name=name, key=key)
        if problem.startswith("unknown key"):
            problem = _of_other_choices(loader, chosen, parent=parent, key=key) or problem
        return f"{'~' * override.is_delete()}{key}: {problem}"
    if not override.is_add() and isinstance(_at(base, key), DictConfig) and isinstance(override.value(), list):
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


def _of_other_choices(loader: Loader, chosen: Sequence[str], *, parent: str, key: str) -> str | None:
    """Return which other files of the group that fills a section bring a key; None where none does."""
    group, having = parent.replace(".", "/"), list[str]()
    for choice in [f"{group}={name}" for name in loader.options(group)] if group else []:
        with suppress(*COMPOSITION_ERRORS):
            if not _split(loader.load([*chosen, choice]), key)[1]:
                having.append(choice)
    return f"unknown key; {'these have it' if having[1:] else 'this has it'}: {', '.join(having)}" if having else None


def _unknown(base: DictConfig, groups: Sequence[str], *, parent: str, name: str, key: str) -> str:
    section, prefix, accepted = _at(base, parent), f"{parent}." if parent else "", list[str]()
    with suppress(ValueError, TypeError, AttributeError, KeyError):  # no section, or one that builds nothing known
        accepted = list(parameters(resolve(section[TARGET])))
    if key == prefix + name and name in accepted:
        return f"not set in the config; to add it write +{key}=..."
    everywhere = [path for path, _ in leaves(OmegaConf.to_container(base, resolve=False), "")]
    same = [path for path in everywhere if path.rpartition(".")[2] == key and not path.startswith("hydra.")]
    if len(same) == 1:  # lr -> optimizer.lr
        return f"unknown key; did you mean {same[0]}?"
    names = [str(other) for other in section] if isinstance(section, DictConfig) else []
    known = sorted({*names, *groups, *accepted} - {"hydra", TARGET, PARTIAL})
    below = key.removeprefix(prefix + name)
    whole = [other + below for other in known if not below or _split(base, prefix + other + below)[1] == ""]
    return f"unknown key{nearest_key(name + below, whole or known, prefix=prefix)}"
