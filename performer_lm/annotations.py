"""Whether a plain config value fits a constructor's annotation.

Values are those of YAML: None, bool, int, float, str, lists, dicts; and nodes, dicts with a `_target_`, which stand for
the object they build (or, with `_partial_`, for a factory of it).
"""

import collections.abc
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from performer_lm.building import PARTIAL, TARGET, resolve
from performer_lm.ranges import refusal


class Section:
    """Whatever a section with a `_target_` builds."""


# The scalars that each type is written as. A bool is no number here, though Python says so.
_SCALARS: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    Path: (str,),
    None: (type(None),),
    type(None): (type(None),),
}
_LISTS = (list, tuple, *(getattr(collections.abc, name) for name in ("Sequence", "Iterable", "Collection")))
_DICTS = (dict, collections.abc.Mapping)
_UNIONS = (Union, types.UnionType)


def mismatches(wanted: Any, value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield `(key, problem)` for each part of `value` that does not fit the annotation `wanted`."""
    bounds: tuple[Any, ...] = ()
    if typing.get_origin(wanted) is Annotated:
        wanted, *bounds = typing.get_args(wanted)  # type: ignore[assignment]
    kind, args = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if _says_nothing(wanted):
        return
    if kind in _UNIONS:
        yield from _union(args, value, key, wanted)
    elif kind in _LISTS and isinstance(value, list) and (arms := _items(kind, args, len(value))) is not None:
        for index, (arm, item) in enumerate(zip(arms, value, strict=True)):
            yield from mismatches(arm, item, f"{key}[{index}]")
    elif kind in _DICTS and isinstance(value, dict) and not is_node(value):
        for name, item in value.items():
            yield from mismatches(args[1] if args else Any, item, f"{key}.{name}")
    elif not (_builds(value, kind, args) if is_node(value) else _is_scalar(value, kind, args)):
        hint = f"; for text write '\"{value}\"'" if wanted is str and type(value) in (int, float, bool) else ""
        got = len(value) if kind is tuple and isinstance(value, list) else _got(value)
        yield key, f"wanted {describe(wanted)}, got {got}{hint}"
    elif type(value) in (int, float) and (problem := refusal(value, bounds)):
        yield key, problem


def describe(wanted: Any) -> str:
    """Return an annotation in a user's words: `int`, `a list of float`, `'fast' or 'slow'`, `str or null`."""
    kind, args = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if kind is Annotated:
        return describe(args[0])
    if kind in _UNIONS:
        spelled = [arm for arm in args if _has_words(arm)]
        arms = args if all(arm is type(None) for arm in spelled) else spelled
        return " or ".join(dict.fromkeys(describe(arm) for arm in arms))
    if kind is Literal:
        return " or ".join(repr(arm) for arm in args)
    if kind is tuple and args and Ellipsis not in args:
        return f"a list of {len(args)} ({', '.join(describe(arm) for arm in args)})"
    if kind in _LISTS:
        return f"a list of {describe(args[0])}" if args else "a list"
    if kind in _DICTS:
        return f"a section of {describe(args[1])}" if args else "a section"
    words: dict[Any, str] = {None: "null", type(None): "null", Path: "a path", Section: "a section with _target_"}
    words[collections.abc.Callable] = "a factory (a section with _target_ and _partial_: true)"
    return words.get(kind) or str(getattr(kind, "__name__", wanted))


def is_node(value: Any) -> bool:
    """Return True if `value` is a section that builds something."""
    return isinstance(value, dict) and TARGET in value


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of all scalars in plain data, and of its empty parts."""
    if isinstance(value, dict | list) and value:
        names = value if isinstance(value, dict) else range(len(value))
        for name in names:
            inner = f"{key}[{name}]" if isinstance(value, list) else f"{key}.{name}" if key else str(name)
            yield from leaves(value[name], inner)
    else:
        yield key, value


def _says_nothing(wanted: Any) -> bool:
    """Return True for annotations that cannot be checked: Any, none at all, a type variable, an unevaluated name."""
    return wanted in (Any, object, inspect.Parameter.empty) or isinstance(wanted, (str, typing.TypeVar))


def _has_words(wanted: Any) -> bool:
    """Return True if a config can spell a value of a type: of `float | Tensor`, the first alone."""
    kind = typing.get_origin(wanted) or wanted
    return kind in (*_SCALARS, *_LISTS, *_DICTS, Annotated, Literal, Section, collections.abc.Callable)


def _is_scalar(value: Any, kind: Any, args: tuple[Any, ...]) -> bool:
    if kind is Literal:
        return any(type(value) is type(arm) and value == arm for arm in args)
    return type(value) in _SCALARS.get(kind, ())


def _items(kind: Any, args: tuple[Any, ...], length: int) -> tuple[Any, ...] | None:
    """Return the annotation of each item of a list; None for a tuple of another length."""
    if kind is tuple and args and Ellipsis not in args:
        return args if len(args) == length else None
    return (args[0] if args else Any,) * length


def _union(arms: tuple[Any, ...], value: Any, key: str, wanted: Any) -> Iterator[tuple[str, str]]:
    """Yield nothing if an arm fits; else the problems inside the arm of the value's own kind; else the whole."""
    tried = [list(mismatches(arm, value, key)) for arm in arms]
    if all(tried):
        inside = [found for found in tried if all(where != key or text.startswith("must ") for where, text in found)]
        yield from inside[0] if inside else [(key, f"wanted {describe(wanted)}, got {_got(value)}")]


def _builds(node: dict[str, Any], kind: Any, args: tuple[Any, ...]) -> bool:
    """Return True if the product of `node` fits; a function's product is taken on trust."""
    try:
        target = resolve(str(node[TARGET]))
    except ValueError:
        return True  # refused, and reported, at the node itself
    if kind is collections.abc.Callable:
        kind = args[1] if len(args) == 2 and node.get(PARTIAL) else Any
    elif node.get(PARTIAL) or kind in (*_SCALARS, Literal):
        return False
    kind = typing.get_origin(kind) or kind
    if _says_nothing(kind) or kind is Section or not inspect.isclass(target) or not inspect.isclass(kind):
        return True
    return getattr(kind, "_is_protocol", False) or issubclass(target, kind)  # not every protocol can be asked


def _got(value: Any) -> str:
    if is_node(value):
        return f"{'a factory of ' if value.get(PARTIAL) else ''}{value[TARGET]}"
    if isinstance(value, dict):
        return "a section without _target_"
    return "null" if value is None else f"{value!r} ({type(value).__name__})"
