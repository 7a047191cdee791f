"""What is wrong with a command line's overrides, one by one, with the nearest valid name.

Hydra stops at its first mistake and says it in its own words. This room is entered only after composition failed.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from performer_lm.cli.choices import dotted_choice, is_choice, misplaced, no_choice, options, wrong_choices
from performer_lm.cli.errors import nearest_key
from performer_lm.cli.schema import HYDRA_KEYS, parameters
from performer_lm.cli.targets import resolve

COMPOSITION_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    ValueError,
    OSError,
    AssertionError,
    AttributeError,
)
"""What Hydra raises for a mistake in overrides or config files; the last two are OmegaConf's, for a key below null."""


@dataclass
class Mistakes:
    """Problems by the override they are about: those that decide what is composed, and those that only set a key."""

    choices: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str], *, multirun: bool) -> Self:
        """Look at each override by itself."""
        found = cls()
        names = options(loader, "")
        if not loader.repository.config_exists(config_name):
            found.choices["--config-name"] = no_choice("--config-name", config_name, names)
            return found
        parsed = found._parse(loader, overrides, multirun=multirun)
        choices = [override for override in parsed if is_choice(loader, override)]
        for override in choices:
            found.choices |= {str(override.input_line): problem for problem in wrong_choices(loader, override)}
        if not found.choices:
            found._look_up(loader, config_name, choices, [o for o in parsed if not is_choice(loader, o)])
        return found

    def _parse(self, loader: ConfigLoaderImpl, overrides: Sequence[str], *, multirun: bool) -> list[Override]:
        parsed: list[Override] = []
        for text in overrides:
            try:
                parsed += OverridesParser.create(loader).parse_overrides([text])
            except HydraException as error:
                self.choices[text] = _syntax(text, error)
                continue
            if parsed[-1].is_sweep_override() and not multirun:
                self.choices[text] = f"{text}: several values need -m (or --multirun)"
        return parsed

    def _look_up(
        self, loader: ConfigLoaderImpl, config_name: str, choices: list[Override], settings: list[Override]
    ) -> None:
        """Compose with the choices alone, look up the key of every other override in the result, and try each."""
        base = self._choose(loader, config_name, sorted(choices, key=lambda choice: choice.key_or_group.count("/")))
        if base is None or self.choices:
            return
        chosen = [str(override.input_line) for override in choices]
        groups = loader.repository.get_group_options("", ObjectType.GROUP)
        for override in settings:
            problems = [*_wrong_key(override, base, groups), dotted_choice(loader, override)]
            self.keys |= {str(override.input_line): problem for problem in problems if problem}
        for text in [str(override.input_line) for override in settings if str(override.input_line) not in self.keys]:
            try:
                loader.load_configuration(config_name, [*chosen, text], run_mode=RunMode.MULTIRUN)
            except COMPOSITION_ERRORS as error:
                self.keys[text] = f"{text}: {in_one_line(error.__cause__ or error)}"

    def _choose(self, loader: ConfigLoaderImpl, config_name: str, choices: list[Override]) -> DictConfig | None:
        """Compose with one choice after the other, outer groups first; None where config files are wrong."""
        taken: list[str] = []
        try:
            base = loader.load_configuration(config_name, taken, run_mode=RunMode.MULTIRUN)
        except COMPOSITION_ERRORS:
            return None
        for override in choices:
            text = str(override.input_line)
            try:
                base = loader.load_configuration(config_name, [*taken, text], run_mode=RunMode.MULTIRUN)
            except COMPOSITION_ERRORS as error:
                self.choices[text] = misplaced(loader, override, base) or f"{text}: {in_one_line(error)}"
            else:
                taken.append(text)
        return base


def in_one_line(error: BaseException) -> str:
    """Return what an error and its cause say, on one line, without Hydra's list of search paths."""
    chain = [error] + ([error.__cause__] if error.__cause__ is not None else [])
    texts = [_in_words(str(link)) for link in chain]
    return ": ".join(text for text in texts if text) or type(error).__name__


def _in_words(text: str) -> str:
    """Return an error's words without what only its own library can use: search paths, node types, parser states."""
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
    return f"{text}: not a valid override ({said}); to give it as text write {_as_text(text)}"


def _as_text(text: str) -> str:
    """Return an override as a shell takes it and Hydra reads its value as it stands: `"a='[1'"`."""
    key, _, value = text.partition("=")
    quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    return shlex.quote(quoted) if set('"$`!\\') & set(quoted) else f'"{quoted}"'


def _wrong_key(override: Override, base: DictConfig, groups: Sequence[str]) -> Iterator[str]:
    key, line = override.key_or_group, str(override.input_line)
    parent, name = _split(base, key)
    if override.is_add():
        if name == "" and not OmegaConf.is_config(_at(base, key)):
            yield f"{line}: {key} is in the config already; write {line.lstrip('+')}"
    elif name != "" and not override.is_force_add():
        yield f"{'~' * override.is_delete()}{key}: {_unknown(base, groups, parent=parent, name=name, key=key)}"
    elif isinstance(_at(base, key), DictConfig) and isinstance(override.value(), list) and not override.is_delete():
        yield f"{line}: wanted a section (key=value pairs below {key}), got a list"


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
    accepted = _accepted(section)
    if key == prefix + name and name in accepted:
        return f"not set in the config; to add it write +{key}=..."
    names = [str(other) for other in section] if isinstance(section, DictConfig) else []
    names += [] if parent else groups
    below = key.removeprefix(prefix + name)
    known = sorted({*names, *accepted} - {"hydra", *HYDRA_KEYS})
    whole = [other + below for other in known if not below or _split(base, prefix + other + below)[1] == ""]
    return f"unknown key{_same_name(base, key) or nearest_key(name + below, whole or known, prefix=prefix)}"


def _accepted(section: Any) -> list[str]:
    """Return the parameters of what a section builds, if it builds something that it may."""
    if not isinstance(section, DictConfig) or not isinstance(section.get("_target_"), str):
        return []
    try:
        return list(parameters(resolve(section["_target_"])))
    except ValueError:
        return []


def _same_name(cfg: DictConfig, key: str) -> str:
    """Suggest the one key of the whole config whose last name is `key`: `lr` -> `optimizer.lr`."""
    found = [path for path in _paths(cfg, "") if path.rpartition(".")[2] == key and not path.startswith("hydra.")]
    return f"; did you mean {found[0]}?" if len(found) == 1 else ""


def _paths(cfg: DictConfig, prefix: str) -> Iterator[str]:
    for name in map(str, cfg):
        yield f"{prefix}{name}"
        if not OmegaConf.is_missing(cfg, name) and not OmegaConf.is_interpolation(cfg, name):
            value = cfg[name]
            if isinstance(value, DictConfig):
                yield from _paths(value, f"{prefix}{name}.")
