"""Small stand-ins for einops and annotated_types, with which an exported model needs torch and transformers alone.

They do what this package's own sources ask of those two libraries, and no more.
"""

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Ge:
    """At least so much."""

    ge: Any


@dataclass(frozen=True)
class Gt:
    """More than that."""

    gt: Any


@dataclass(frozen=True)
class Le:
    """At most so much."""

    le: Any


@dataclass(frozen=True)
class Lt:
    """Less than that."""

    lt: Any


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Reorder, split and merge the axes of a tensor as `einops.rearrange` does; `...` stands for axes kept as they are.

    Raises:
        ValueError: for sizes that do not fit.
    """
    left, right = _read(pattern, x.ndim)
    if len(left) != x.ndim:
        raise ValueError(f"{pattern!r} needs {len(left)} axes, got {x.ndim}")
    known: dict[str, int] = dict(sizes)
    for axes, size in zip(left, x.shape, strict=True):
        open_ = [axis for axis in axes if axis not in known]
        rest = prod(known[axis] for axis in axes if axis in known)
        if open_:
            known[open_[0]] = size // rest
        if len(open_) > 1 or prod(known[axis] for axis in axes) != size:
            raise ValueError(f"{pattern!r} does not fit an axis of {size} with {sizes}")
    flat = [axis for axes in left for axis in axes]
    wanted = [axis for axes in right for axis in axes]
    new = [axis for axis in wanted if axis not in flat]
    x = x.reshape([known[axis] for axis in flat])
    x = x.permute([flat.index(axis) for axis in wanted if axis in flat])
    for place, axis in enumerate(wanted):
        if axis in new:
            x = x.unsqueeze(place)
    x = x.expand([known[axis] for axis in wanted])
    return x.reshape([prod(known[axis] for axis in axes) for axes in right])


def repeat(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Reorder axes and add new ones, along which values are repeated, as `einops.repeat` does."""
    return rearrange(x, pattern, **sizes)


def einsum(*tensors_and_pattern: Any) -> Tensor:
    """Multiply and sum tensors over named axes, as `einops.einsum` does."""
    *tensors, pattern = tensors_and_pattern
    names = sorted(set(pattern.replace("->", " ").replace(",", " ").split()))
    letters = {name: chr(ord("a") + place) for place, name in enumerate(names)}
    words = pattern.replace("->", " -> ").replace(",", " , ").split()
    return torch.einsum("".join(letters.get(word, word) for word in words), *tensors)


@cache
def _read(pattern: str, ndim: int) -> tuple[Axes, Axes]:
    """Return the axes of both sides of a pattern, each a group of names; an axis of one has none."""
    left, right = (side.replace("(", " ( ").replace(")", " ) ").split() for side in pattern.split("->"))
    inside, named = False, 0
    for word in left:
        inside = {"(": True, ")": False}.get(word, inside)
        named += word != "..." and word != ")" and (word == "(" or not inside)
    kept = [f"_{place}" for place in range(ndim - named)]
    return _group(left, kept), _group(right, kept)


def _group(words: list[str], kept: list[str]) -> Axes:
    groups: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    for word in words:
        if word == "(":
            inside = []
        elif word == ")":
            groups.append(tuple(inside or ()))
            inside = None
        elif word == "...":
            groups += [(axis,) for axis in kept]
        elif inside is not None:
            inside.append(word)
        else:
            groups.append(() if word == "1" else (word,))
    return tuple(groups)
