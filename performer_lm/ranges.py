"""Ranges of numeric arguments, declared where the argument is: `depth: Annotated[int, Ge(1), Le(4096)]`.

One rule serves all: `ranged` holds a class or function to the ranges it declares, whoever calls it, and the command
line holds configs to them. A number in a range is finite, and an integer fits 64 bits; in a config every number is.
"""

import dataclasses
import functools
import inspect
import math
import operator
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

Target = TypeVar("Target", bound=Callable[..., Any])

Count = Annotated[int, Ge(1)]
Size = Annotated[int, Ge(1), Le(2**30)]  # of a dimension: more would overflow before it asked for memory
Whole = Annotated[int, Ge(0)]
NotNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]
Fraction = Annotated[float, Ge(0), Le(1)]

LARGEST = 2**63 - 1
_BOUNDS: dict[type, tuple[str, Callable[[Any, Any], bool]]] = {
    Ge: ("at least", operator.ge),
    Gt: ("above", operator.gt),
    Le: ("at most", operator.le),
    Lt: ("below", operator.lt),
}


def refusal(number: float, bounds: Iterable[Any] = ()) -> str | None:
    """Return why a number is refused, `must be at least 1, got 0`; None if it is within its bounds."""
    if isinstance(number, int) and abs(number) > LARGEST:
        return (
            f"must be within 64 bits (at most {LARGEST}), got {'-' * (number < 0)}2^{number.bit_length() - 1} or more"
        )
    if not math.isfinite(number):
        return f"must be a finite number, got {number}"
    rules = [(*_BOUNDS[type(bound)], dataclasses.astuple(bound)[0]) for bound in bounds if type(bound) in _BOUNDS]
    if all(holds(number, limit) for _, holds, limit in rules):
        return None
    return f"must be {' and '.join(f'{words} {limit}' for words, _, limit in rules)}, got {number}"


def ranged(target: Target) -> Target:
    """Let a class or function refuse arguments outside the ranges that its signature declares.

    Raises:
        ValueError: in one line, when the target is called: `window must be at least 1, got 0`.
    """
    function: Any = target.__init__ if inspect.isclass(target) else target
    names = list(inspect.signature(function).parameters)
    numeric = {name: wanted for name, wanted in function.__annotations__.items() if _kinds(wanted)}

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **options}
        for name in numeric.keys() & given.keys():
            for where, problem in _outside(numeric[name], given[name], name):
                raise ValueError(f"{where} {problem}")
        return function(*args, **options)

    if not inspect.isclass(target):
        return checked  # type: ignore[return-value]
    target.__init__ = checked  # type: ignore[method-assign]
    return target


def _kinds(wanted: Any) -> dict[type, tuple[Any, ...]]:
    """Return the bounds that an annotation sets for integers and for floats, where it takes them."""
    if get_origin(wanted) in (Union, types.UnionType):
        return {kind: bounds for arm in get_args(wanted) for kind, bounds in _kinds(arm).items()}
    base, *bounds = get_args(wanted) if get_origin(wanted) is Annotated else (wanted,)
    if bounds and base in (int, float):
        return {base: tuple(bounds)}
    items = get_args(base) if get_origin(base) in (list, tuple) else ()
    return {get_origin(base): items} if any(_kinds(item) for item in items) else {}


def _outside(wanted: Any, value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the place of each number that its annotation refuses, and why."""
    kinds = _kinds(wanted)
    if isinstance(value, list | tuple) and (list in kinds or tuple in kinds):
        if tuple in kinds and len(value) != len(kinds[tuple]):
            yield name, f"must be {len(kinds[tuple])} numbers, got {len(value)}"
        for index, item in enumerate(value):
            yield from _outside((kinds.get(list) or kinds[tuple])[0], item, f"{name}[{index}]")
    elif type(value) in (int, float) and (type(value) in kinds or float in kinds):
        problem = refusal(value, kinds.get(type(value), kinds.get(float, ())))
        if problem:
            yield name, problem
    elif isinstance(value, str | dict | list | tuple) and kinds and _takes_numbers_alone(wanted):
        yield name, f"must be a number, got {value!r}"


def _takes_numbers_alone(wanted: Any) -> bool:
    """Return True if each arm of an annotation is None, a number or a list of them."""
    arms = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    return all(arm is type(None) or arm in (int, float) or _kinds(arm) for arm in arms)
