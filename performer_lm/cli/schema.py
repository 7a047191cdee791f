"""The config tree, held against the constructors it names: they are the schema.

Every section with a `_target_` is checked against that target's signature, before anything is built: the name is one
that a config may build, each key is a parameter, each value fits the annotation, nothing required is missing. What
stands outside every such section must be declared by the entry point. All problems are found in one pass.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from performer_lm.cli.annotations import UNKNOWN, describe, is_node, mismatches
from performer_lm.cli.errors import UsageError, did_you_mean, nearest_key
from performer_lm.cli.targets import resolve

HYDRA_KEYS: dict[str, Any] = {"_target_": str, "_partial_": bool, "_recursive_": bool, "_convert_": str}
_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.\[\]]*)\}")


def check(
    cfg: DictConfig, *, keys: Mapping[str, Any] | None = None, supplied: Mapping[str, Collection[str]] | None = None
) -> None:
    """Check a composed config against the constructors it names.

    Args:
        cfg: the task's config, without Hydra's own section.
        keys: annotations of the keys that belong to no target, by dotted name: `{"seed": int, "ckpt": str | None}`.
        supplied: by section, the arguments that the entry point adds when it builds it: `{"model": ["vocab_size"]}`.

    Raises:
        UsageError: with one line for each problem: the key, what was wanted, what was got, the nearest name.
    """
    checker = _Checker(keys or {}, supplied or {})
    tree = checker.resolve(cfg, OmegaConf.to_container(cfg, resolve=False), "")
    checker.visit(tree, "")
    problems = checker.problems
    # A value that stands elsewhere is wrong there, once.
    lines = [f"{key}: {text}" for key, text in problems.items() if checker.references.get(key) not in problems]
    if lines:
        raise UsageError(*lines)


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class or function by name, annotations evaluated where that is possible.

    What `**options: Unpack[T]` of a TypedDict T takes counts one by one.
    """
    try:
        found = dict(inspect.signature(target, eval_str=True).parameters)
    except NameError:  # a name that exists for type checkers only
        return dict(inspect.signature(target).parameters)
    return {name: each for parameter in found.values() for name, each in _unpacked(parameter)}


def _unpacked(parameter: inspect.Parameter) -> Iterator[tuple[str, inspect.Parameter]]:
    if get_origin(parameter.annotation) is not Unpack:
        yield parameter.name, parameter
        return
    (options,) = get_args(parameter.annotation)
    for name, wanted in get_type_hints(options).items():
        default = inspect.Parameter.empty if name in options.__required_keys__ else None
        yield name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=wanted)


class _Checker:
    def __init__(self, keys: Mapping[str, Any], supplied: Mapping[str, Collection[str]]) -> None:
        self.keys = keys
        self.supplied = supplied
        self.problems: dict[str, str] = {}
        self.references: dict[str, str] = {}
        self.open: list[Any] = []  # the sections around what is being resolved, references followed
        self.is_endless = False

    def note(self, key: str, text: str) -> None:
        self.problems.setdefault(key, text)

    def resolve(self, node: Any, raw: Any, key: str) -> Any:
        """Return `node` as plain dicts, lists and scalars; note what is missing or does not resolve."""
        self.open.append(node)
        try:
            if isinstance(node, DictConfig):
                return {name: self._item(node, raw, name, _join(key, name)) for name in node}
            if isinstance(node, ListConfig):
                return [self._item(node, raw, index, f"{key}[{index}]") for index in range(len(node))]
            return node
        finally:
            self.open.pop()

    def _item(self, node: Any, raw: Any, name: Any, key: str) -> Any:
        # `raw` is what was written; below an interpolation nothing was, and the values are checked where they stand.
        written = raw[name] if isinstance(raw, (dict, list)) else None
        if isinstance(written, str) and (reference := _REFERENCE.fullmatch(written)):
            self.references[key] = reference[1]
        if OmegaConf.is_missing(node, name):
            section, _, last = key.rpartition(".")
            if last not in self.supplied.get(section, ()):
                self.note(key, f"needs a value: {key}=...")
            return UNKNOWN
        try:
            value = node[name]
        except OmegaConfBaseException as error:
            if written is not None:
                self.note(key, f"{written} does not resolve: {_unresolved(error)}")
            return UNKNOWN
        if isinstance(value, (DictConfig, ListConfig)) and any(value is section for section in self.open):
            self._note_endless(key)
            return UNKNOWN
        return self.resolve(value, written, key)

    def _note_endless(self, key: str) -> None:
        """Tell of a reference to a section around it, once: where it is met first, at the key that was written."""
        if not self.is_endless:
            self.is_endless = True
            written = max((name for name in self.references if f"{key}.".startswith(f"{name}.")), key=len, default=key)
            self.note(written, f"${{{self.references.get(written, key)}}} holds itself")

    def visit(self, value: Any, key: str) -> None:
        """Check a part of the tree that no target owns."""
        if key in self.references or value is UNKNOWN:
            return
        if key in self.keys:
            self._fit(self.keys[key], value, key)
        elif is_node(value):
            self._node(value, key)
        elif isinstance(value, dict):
            for name, item in value.items():
                self.visit(item, _join(key, name))
        elif isinstance(value, list) and value:
            for index, item in enumerate(value):
                self.visit(item, f"{key}[{index}]")
        elif value not in (None, []):
            self.note(key, f"unknown key{did_you_mean(key, self.keys)}")

    def _fit(self, wanted: Any, value: Any, key: str) -> None:
        for where, text in mismatches(wanted, value, key):
            self.note(where, text)
        self._nodes_within(value, key)

    def _nodes_within(self, value: Any, key: str) -> None:
        if key in self.references:
            return
        if is_node(value):
            self._node(value, key)
        elif isinstance(value, dict):
            for name, item in value.items():
                self._nodes_within(item, f"{key}.{name}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self._nodes_within(item, f"{key}[{index}]")

    def _node(self, node: dict[str, Any], key: str) -> None:
        target = self._target(node, key)
        wanted = parameters(target) if target is not None else {}
        is_open = target is None or any(p.kind is p.VAR_KEYWORD for p in wanted.values())
        names = [name for name, p in wanted.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        for name, value in node.items():
            where = f"{key}.{name}"
            if name in HYDRA_KEYS:
                self._fit(HYDRA_KEYS[name], value, where)
            elif name in names:
                self._fit(_annotation(wanted[name]), value, where)
            elif is_open and name != "_args_":
                self._nodes_within(value, where)
            else:
                self.note(where, f"unknown key{nearest_key(str(name), names, prefix=f'{key}.')}")
                self._nodes_within(value, where)
        given = {*node, *self.supplied.get(key, ())}
        for name in names if not node.get("_partial_") else ():
            if wanted[name].default is inspect.Parameter.empty and name not in given:
                self.note(f"{key}.{name}", f"missing; wanted {describe(_annotation(wanted[name]))}")

    def _target(self, node: dict[str, Any], key: str) -> Callable[..., Any] | None:
        path = node["_target_"]
        if not isinstance(path, str):
            return None
        try:
            return resolve(path)
        except ValueError as refusal:
            self.note(f"{key}._target_", str(refusal))
            return None


def _unresolved(error: OmegaConfBaseException) -> str:
    told = str(error).partition("\n")[0]
    return "it gives its resolver the wrong arguments" if told.startswith("TypeError") else told


def _join(section: str, name: Any) -> str:
    return f"{section}.{name}" if section else str(name)


def _annotation(parameter: inspect.Parameter) -> Any:
    """Return what a parameter takes; a default of None means that None is taken, whatever the annotation says."""
    if parameter.default is None and parameter.annotation is not inspect.Parameter.empty:
        return parameter.annotation | None if not isinstance(parameter.annotation, str) else Any
    return parameter.annotation
