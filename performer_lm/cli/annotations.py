"""Whether a plain config value fits a constructor's annotation.

Values are what YAML has: None, bool, int, float, str, lists, dicts; and nodes, dicts with a `_target_`, which stand for
the object they build (or, with `_partial_`, for a function that builds it).
"""

import collections.abc
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from performer_lm.cli.targets import resolve

UNKNOWN = object()
"""Stands for a value that could not be resolved; it fits everything, for it was reported already."""

# What the config spells with a scalar, and which scalars spell it. A bool is no number here, though Python says so.
_SCALARS: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    Path: (str,),
    os.PathLike: (str,),
    None: (type(None),),
    type(None): (type(None),),
}
_LISTS = (list, set, frozenset, *(getattr(collections.abc, name) for name in ("Sequence", "Iterable", "Collection")))
_DICTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_PARTIAL = "a factory (a section with _target_ and _partial_: true)"


def mismatches(wanted: Any, value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield `(key, problem)` for each part of `value` that does not fit the annotation `wanted`."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        yield from mismatches(args[0], value, key)
    elif value is UNKNOWN or _is_open(wanted):
        return
    elif origin in (Union, types.UnionType):
        yield from _union(args, value, key, wanted)
    elif is_node(value):
        if not _builds(value, origin or wanted, args):
            yield key, f"wanted {describe(wanted)}, got {_got(value)}"
    elif (origin or wanted) in _LISTS and isinstance(value, list):
        for index, item in enumerate(value):
            yield from mismatches(args[0] if args else Any, item, f"{key}[{index}]")
    elif (origin or wanted) is tuple and isinstance(value, list):
        yield from _tuple(args, value, key, wanted)
    elif _is_dict(origin or wanted) and isinstance(value, dict):
        for name, item in value.items():
            yield from mismatches(args[1] if len(args) == 2 else Any, item, f"{key}.{name}")
    elif not _is_scalar(value, wanted, origin, args):
        yield key, f"wanted {describe(wanted)}, got {_got(value)}{_hint(wanted, value)}"


def describe(wanted: Any) -> str:
    """Spell an annotation in a user's words: `int`, `list of float`, `'fast' or 'slow'`, `str or null`."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is None or wanted is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        spoken = [arm for arm in args if _has_words(arm)]
        arms = args if all(arm is type(None) for arm in spoken) else spoken
        return " or ".join(dict.fromkeys(describe(arm) for arm in arms))
    if origin is Literal:
        return " or ".join(repr(arm) for arm in args)
    if (origin or wanted) is collections.abc.Callable:
        return _PARTIAL
    if (origin or wanted) is tuple and args and Ellipsis not in args:
        return f"a list of {len(args)} ({', '.join(describe(arm) for arm in args)})"
    if (origin or wanted) in (*_LISTS, tuple):
        return f"a list of {describe(args[0])}" if args else "a list"
    if _is_dict(origin or wanted):
        return f"a section of {describe(args[1])}" if len(args) == 2 else "a section"
    if inspect.isclass(wanted) and issubclass(wanted, Enum):
        return " or ".join(repr(arm.value) for arm in wanted)
    if wanted in _SCALARS:
        return "a path" if wanted in (Path, os.PathLike) else wanted.__name__
    return getattr(origin or wanted, "__name__", str(wanted))


def is_node(value: Any) -> bool:
    """Tell whether `value` is a section that builds something."""
    return isinstance(value, dict) and "_target_" in value


def _is_open(wanted: Any) -> bool:
    """Tell annotations that say nothing checkable: Any, none at all, a type variable, a name never evaluated."""
    return wanted in (Any, object, inspect.Parameter.empty) or isinstance(wanted, (str, typing.TypeVar))


def _has_words(wanted: Any) -> bool:
    """Tell whether a config can spell a value of this type: `float`, yes; of `float | Tensor`, the first alone."""
    kind = typing.get_origin(wanted) or wanted
    return kind in (*_SCALARS, *_LISTS, tuple, Literal, collections.abc.Callable) or _is_dict(kind)


def _is_dict(wanted: Any) -> bool:
    return wanted in _DICTS or typing.is_typeddict(wanted)


def _is_scalar(value: Any, wanted: Any, origin: Any, args: tuple[Any, ...]) -> bool:
    if origin is Literal:
        return any(type(value) is type(arm) and value == arm for arm in args)
    if inspect.isclass(wanted) and issubclass(wanted, Enum):
        return any(value == arm.value for arm in wanted)
    return type(value) in _SCALARS.get(origin or wanted, ())


def _union(arms: tuple[Any, ...], value: Any, key: str, wanted: Any) -> Iterator[tuple[str, str]]:
    """Yield nothing if an arm fits; else what is wrong inside the arm of the value's own kind; else the whole."""
    tried = [list(mismatches(arm, value, key)) for arm in arms]
    if all(tried):
        inside = [problems for problems in tried if all(where != key for where, _ in problems)]
        yield from inside[0] if inside else [(key, f"wanted {describe(wanted)}, got {_got(value)}")]


def _tuple(arms: tuple[Any, ...], value: list[Any], key: str, wanted: Any) -> Iterator[tuple[str, str]]:
    if not arms or Ellipsis in arms:
        arms = (arms[0] if arms else Any,) * len(value)
    if len(arms) != len(value):
        yield key, f"wanted {describe(wanted)}, got {len(value)}"
        return
    for index, (arm, item) in enumerate(zip(arms, value, strict=True)):
        yield from mismatches(arm, item, f"{key}[{index}]")


def _builds(node: dict[str, Any], wanted: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether what `node` builds fits `wanted`; a function's product is taken on trust."""
    try:
        target = resolve(str(node["_target_"]))
    except ValueError:
        return True  # refused, and reported, at the node itself
    if wanted is collections.abc.Callable:
        product = typing.get_origin(args[1]) or args[1] if len(args) == 2 else Any
        return not node.get("_partial_") or _is_subclass(target, product)
    return not node.get("_partial_") and wanted not in (*_SCALARS, Literal) and _is_subclass(target, wanted)


def _is_subclass(target: Callable[..., Any], wanted: Any) -> bool:
    if _is_open(wanted) or not inspect.isclass(target) or not inspect.isclass(wanted):
        return True
    if getattr(wanted, "_is_protocol", False):
        return True  # not every protocol can be asked
    return issubclass(target, wanted)


def _got(value: Any) -> str:
    if is_node(value):
        return f"{'a factory of ' if value.get('_partial_') else ''}{value['_target_']}"
    if isinstance(value, dict):
        return "a section without _target_"
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _hint(wanted: Any, value: Any) -> str:
    """Say how to get a number past YAML, which reads it as a number, where text was wanted."""
    return f"; for text write '\"{value}\"'" if wanted is str and type(value) in (int, float, bool) else ""
