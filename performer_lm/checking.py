"""Plain config sections, held against the constructors they name: they are the schema.

Every section with a `_target_` is checked against that target's signature, before anything is built: the name is one
that a config may build, each key is a parameter, each value fits the annotation, nothing required is missing. What
stands outside every such section must be declared. All problems are found in one pass.
"""

from collections.abc import Callable, Collection, Mapping
from inspect import Parameter
from typing import Any

from performer_lm.annotations import describe, is_node, mismatches
from performer_lm.building import PARTIAL, TARGET, parameters, resolve
from performer_lm.wording import did_you_mean, nearest_key


class Checker:
    """Collects the problems of a plain config tree.

    Args:
        keys: annotations of the keys that belong to no target, by dotted name: `{"seed": int, "ckpt": str | None}`.
        supplied: by section, the arguments that are added when it is built: `{"model": ["vocab_size"]}`.
        references: by key, the key that its value stands at: it is checked there.
    """

    def __init__(
        self,
        *,
        keys: Mapping[str, Any] | None = None,
        supplied: Mapping[str, Collection[str]] | None = None,
        references: Mapping[str, str] | None = None,
    ) -> None:
        self.keys = keys or {}
        self.supplied = supplied or {}
        self.references = references or {}
        self._problems: dict[str, str] = {}

    def note(self, key: str, text: str) -> None:
        """Keep the first problem of a key."""
        self._problems.setdefault(key, text)

    def lines(self) -> list[str]:
        """Return a line for each problem; a value that stands elsewhere is wrong there, once."""
        here = {key: text for key, text in self._problems.items() if self.references.get(key) not in self._problems}
        return [f"{key}{' ' if text.startswith('must ') else ': '}{text}" for key, text in here.items()]

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
