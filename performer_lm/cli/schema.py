"""The config tree, held against the constructors it names: they are the schema.

Every section with a `_target_` is checked against that target's signature, before anything is built: the name is one
that a config may build, each key is a parameter, each value fits the annotation, nothing required is missing. What
stands outside every such section must be declared by the entry point. All problems are found in one pass, once
every interpolation leads somewhere.
"""

import re
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from performer_lm.building import PARTIAL, TARGET, did_you_mean, parameters, resolve
from performer_lm.cli.annotations import describe, is_node, leaves, mismatches
from performer_lm.cli.errors import UsageError, nearest_key
from performer_lm.wording import short

_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.\[\]]*)\}")


def check(
    cfg: DictConfig, *, keys: Mapping[str, Any] | None = None, supplied: Mapping[str, Collection[str]] | None = None
) -> None:
    """Check a composed config against the constructors it names; set absent keys that may be null to null.

    Args:
        cfg: the task's config, without Hydra's own section.
        keys: annotations of the keys that belong to no target, by dotted name: `{"seed": int, "ckpt": str | None}`.
        supplied: by section, the arguments that the entry point adds when it builds it: `{"model": ["vocab_size"]}`.

    Raises:
        UsageError: with one line for each problem: the key, what was wanted, what was got, the nearest name.
    """
    written = dict(leaves(OmegaConf.to_container(cfg, resolve=False), ""))
    references = {key: found[1] for key, text in written.items() if (found := _REFERENCE.fullmatch(str(text)))}
    tree = _resolved(cfg, written, references)
    checker = _Checker(keys or {}, supplied or {}, references)
    for key, wanted in checker.keys.items():
        if key not in written and not any(name.startswith((f"{key}.", f"{key}[")) for name in written):
            section = key.rpartition(".")[0]
            if list(mismatches(wanted, None, key)):
                checker.note(key, f"missing; wanted {describe(wanted)}")
            elif section and section in written:
                checker.note(section, f"must be a section with {key}, got {short(written[section])}")
            elif section and any(name.startswith(f"{section}[") for name in written):
                checker.note(section, f"must be a section with {key}, got a list")
            else:
                OmegaConf.update(cfg, key, None, force_add=True)
    checker.visit(tree, "")
    # A value that stands elsewhere is wrong there, once.
    problems = {key: text for key, text in checker.problems.items() if references.get(key) not in checker.problems}
    if problems:
        raise UsageError(*(f"{key}{' ' if text.startswith('must ') else ': '}{text}" for key, text in problems.items()))


def _resolved(cfg: DictConfig, written: Mapping[str, Any], references: Mapping[str, str]) -> Any:
    """Return a config as plain data.

    Raises:
        UsageError: for the first value that is missing, or interpolation that leads nowhere or has no end.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        told, key = str(error).partition("\n")[0], str(getattr(error, "full_key", ""))
        if "ecursion" in told:
            within = [f"{place}=${{{target}}}" for place, target in references.items() if target not in written]
            raise UsageError(f"sections that hold each other have no end: {', '.join(within)}") from error
        if isinstance(error, MissingMandatoryValue):
            raise UsageError(f"{key}: needs a value: {key}=...") from error
        told = "it gives its resolver the wrong arguments" if told.startswith("TypeError") else told
        raise UsageError(f"{key}: {written.get(key)} does not resolve: {told}") from error


class _Checker:
    def __init__(
        self, keys: Mapping[str, Any], supplied: Mapping[str, Collection[str]], references: Mapping[str, str]
    ) -> None:
        self.keys = keys
        self.supplied = supplied
        self.references = references
        self.problems: dict[str, str] = {}

    def note(self, key: str, text: str) -> None:
        self.problems.setdefault(key, text)

    def visit(self, value: Any, key: str, *, wanted: Any = None, is_owned: bool = False) -> None:
        """Check a part of the tree; `is_owned` by a target, or by a declared key, its values need no declaration."""
        if not is_owned and key in self.keys:
            wanted, is_owned = self.keys[key], True
        if wanted is not None:
            for where, text in mismatches(wanted, value, key):
                self.note(where, text)
        if key in self.references:
            return  # and what it holds is checked where it stands
        if is_node(value):
            self._node(value, key)
        elif isinstance(value, dict):
            for name, item in value.items():
                self.visit(item, f"{key}.{name}" if key else str(name), is_owned=is_owned)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self.visit(item, f"{key}[{index}]", is_owned=is_owned)
        elif not is_owned and value is not None:
            self.note(key, f"unknown key{did_you_mean(key, self.keys)}")

    def _node(self, node: dict[str, Any], key: str) -> None:
        target = self._target(node, key)
        wanted = parameters(target) if target is not None else {}
        is_open = target is None or any(p.kind is p.VAR_KEYWORD for p in wanted.values())
        named = {name: p for name, p in wanted.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        for name, value in node.items():
            own = {TARGET: str, PARTIAL: bool}.get(name) or (_annotation(named[name]) if name in named else None)
            if own is None and (not is_open or name == "_args_"):
                self.note(f"{key}.{name}", f"unknown key{nearest_key(str(name), named, prefix=f'{key}.')}")
            self.visit(value, f"{key}.{name}", wanted=own, is_owned=True)
        for name, parameter in named.items() if not node.get(PARTIAL) else ():
            if parameter.default is parameter.empty and name not in (*node, *self.supplied.get(key, ())):
                self.note(f"{key}.{name}", f"missing; wanted {describe(_annotation(parameter))}")

    def _target(self, node: dict[str, Any], key: str) -> Callable[..., Any] | None:
        try:
            return resolve(node[TARGET]) if isinstance(node[TARGET], str) else None
        except ValueError as refusal:
            self.note(f"{key}.{TARGET}", str(refusal))
            return None


def _annotation(parameter: Parameter) -> Any:
    """Return the annotation of a parameter; a default of None means that None is taken, too."""
    if parameter.default is None and parameter.annotation is not Parameter.empty:
        return parameter.annotation | None if not isinstance(parameter.annotation, str) else Any
    return parameter.annotation
