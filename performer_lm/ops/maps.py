"""Feature maps phi whose dot products stand in for a kernel, phi(x) . phi(y) ~ K(x, y), with their gradients.

A `FeatureMap` is a function with its tensors. A `BlockMap` is one without negative features, which the causal engine
writes block by block, into memory it has, and pulls gradients through, so that features never outlive their block.
Exponentials stay logarithms, where nothing overflows or vanishes; they are written in units of log 2.

Constant factors common to all features (m^-1/2 and the like) are left out: normalised attention cancels them.

Letters: `g` key heads, `n` tokens (of all sequences in the batch), `d` head width, `m` features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from performer_lm.ops.precision import LOG2_E, precise

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "cos": torch.cos,
    "elu": lambda x: functional.elu(x) + 1.0,
    "exp": torch.exp,
    "gelu": functional.gelu,
    "identity": lambda x: x,
    "leaky_relu": functional.leaky_relu,
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "softplus": functional.softplus,
    "square": torch.square,
    "tanh": torch.tanh,
}
"""The functions of a generalized kernel, by name."""

IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu_, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0.0)),
}
"""Activations that overwrite x, and the way of a gradient back to x: where autograd costs more than the function."""

POSITIVE = frozenset({"abs", "elu", "exp", "relu", "relu_squared", "sigmoid", "softplus", "square"})
"""The activations that never go below zero, so that their attention is an average and may be causal."""


class Features(NamedTuple):
    """The features values * exp(log_scale) of n tokens, `(..., n, m)`; None stands for values 1 or log scale 0."""

    values: Tensor | None
    log_scale: Tensor | None


@dataclass(frozen=True, eq=False)
class FeatureMap(ABC):
    """A map of x `(g, n, d)` with tensors `(g, ...)`, one entry per key head, that gradients may reach."""

    tensors: tuple[Tensor, ...]

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """Return the same map over other tensors."""
        return replace(self, tensors=tensors)

    def to(self, dtype: torch.dtype) -> Self:
        """Return the same map with its tensors in `dtype`."""
        for tensor in self.tensors:
            if tensor.dtype != dtype:
                return self.with_tensors(tuple(t.to(dtype) for t in self.tensors))
        return self

    @abstractmethod
    def __call__(self, x: Tensor) -> Features:
        """Map x to its features `(g, n, m)`, but for `gain`; for autograd to differentiate."""

    def gain(self, x: Tensor) -> Tensor | None:
        """Return the number added to all log features of a token, `(g, n)` natural logarithms, as precise as can be."""
        return None


@dataclass(frozen=True, eq=False)
class Trigonometric(FeatureMap):
    """exp(|x|^2 / 2) [cos w.x, sin w.x] of scale * x (2009.14794, eq. 4): unbiased but signed.

    The tensor is W `(g, m / 2, d)`.
    """

    scale: float = 1.0

    def __call__(self, x: Tensor) -> Features:
        """Map x to sines and cosines."""
        x = self.scale * x
        angles = x @ self.tensors[0].mT
        values = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return Features(values, (0.5 * x.square().sum(dim=-1, keepdim=True)).expand_as(values))


@dataclass(frozen=True, eq=False)
class BlockMap(FeatureMap):
    """A map without negative features.

    Its `code` names the class and its numbers, from which `decode` makes it again: how a map passes through a compiler
    that knows tensors and text.
    """

    logarithmic: ClassVar[bool]
    """Whether features are exponentials, and so are handled as logarithms."""

    _kinds: ClassVar[dict[str, type["BlockMap"]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Make the class known to `decode`."""
        super().__init_subclass__(**options)
        BlockMap._kinds[cls.__name__] = cls

    @abstractmethod
    def write(self, x: Tensor, out: Tensor, *, add: bool) -> None:
        """Write the features of x, or if `logarithmic` their logarithms in units of log 2, to `out` `(g, n, m)`.

        With `add`, add them to what it holds. `gain` is left out.
        """

    @abstractmethod
    def pull(self, x: Tensor, grad: Tensor, *, wanted: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Turn the gradient at features, or natural log features, into those at x and, if `wanted`, at the tensors."""

    def writes_like(self, other: "BlockMap") -> bool:
        """Return True if `write` is the same function for both."""
        return [self.code, *map(id, self.tensors)] == [other.code, *map(id, other.tensors)]

    @property
    def code(self) -> str:
        """Return the class and its numbers as text."""
        code = type(self).__name__
        for field in fields(self)[1:]:  # the tensors stand first
            code += f" {getattr(self, field.name)}"
        return code

    @staticmethod
    def decode(code: str, tensors: tuple[Tensor, ...]) -> "BlockMap":
        """Return the map that has this code, over these tensors."""
        name, *numbers = code.split(" ")
        kind = BlockMap._kinds[name]
        values: list[Any] = []
        for field, number in zip(fields(kind)[1:], numbers, strict=True):
            values.append(number if field.type is str else float(number))
        return kind(tensors, *values)


@dataclass(frozen=True, kw_only=True)
class Maps:
    """The maps of queries and of keys, over `groups` key heads."""

    query: BlockMap
    key: BlockMap
    groups: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of both."""
        return (*self.query.tensors, *self.key.tensors)

    def flat(self, x: Tensor) -> Tensor:
        """View `((g b), ...)` as a map takes it: `(g, n, ...)`, with the tokens of the whole batch."""
        return x.reshape(self.groups, -1, x.shape[-1])

    @property
    def code(self) -> str:
        """Return all but the tensors as text."""
        return f"{self.groups}|{len(self.query.tensors)}|{self.query.code}|{self.key.code}"

    @classmethod
    def decode(cls, code: str, tensors: tuple[Tensor, ...]) -> Self:
        """Return the maps that have this code, over these tensors."""
        groups, count, query, key = code.split("|")
        own, other = tensors[: int(count)], tensors[int(count) :]
        return cls(query=BlockMap.decode(query, own), key=BlockMap.decode(key, other), groups=int(groups))


@dataclass(frozen=True, eq=False)
class Exponential(BlockMap):
    """exp(scale W x + bias - norm |x|^2); the tensors are W `(g, m, d)` and, if any, the bias `(g, m)`.

    With norm 1/2 these are FAVOR+'s positive features (2009.14794, lemma 1). With scale sqrt(1 - 4A) and bias A |w|^2,
    A < 0, they are the bounded ones of FAVOR++ (2205.15317, without its factor (1 - 4A)^(d/4)). Rows [w, -w] make
    either hyperbolic.
    """

    logarithmic = True

    scale: float = 1.0
    norm: float = 0.0

    def __call__(self, x: Tensor) -> Features:
        """Project, with scale and bias."""
        weight, *bias = self.tensors
        logs = self._multiply(x, weight.mT)
        for more in bias:
            logs = logs + more[:, None]
        return Features(None, logs)

    def write(self, x: Tensor, out: Tensor, *, add: bool) -> None:
        """Project in one matrix product."""
        weight, *bias = self.tensors
        out.baddbmm_(x, weight.mT, beta=float(add), alpha=LOG2_E * self.scale)
        for more in bias:
            out.add_(more[:, None], alpha=LOG2_E)

    def writes_like(self, other: BlockMap) -> bool:
        """Return True if `write` is the same function for both, though gains may differ."""
        same = isinstance(other, Exponential) and self.scale == other.scale and len(self.tensors) == len(other.tensors)
        return same and all(one is two for one, two in zip(self.tensors, other.tensors, strict=True))

    def gain(self, x: Tensor) -> Tensor | None:
        """Return -norm |x|^2: of long vectors more than float32 holds, if a weight is to have five digits."""
        if not self.norm:
            return None
        return torch.linalg.vector_norm(x, dim=-1, dtype=precise(x.device)).square() * -self.norm

    def pull(self, x: Tensor, grad: Tensor, *, wanted: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Pull by two matrix products."""
        weight, *bias = self.tensors
        grad_x = self._multiply(grad, weight)
        if self.norm:
            grad_x.addcmul_(x, grad.sum(dim=-1, keepdim=True), value=-2.0 * self.norm)
        if not wanted:
            return grad_x, (None,) * len(self.tensors)
        return grad_x, (self._multiply(grad.mT, x), *(grad.sum(dim=1) for _ in bias))

    def _multiply(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=self.scale)


@dataclass(frozen=True, eq=False)
class Pointwise(BlockMap):
    """Any function of x and the tensors; its gradients come from autograd, block by block."""

    logarithmic = False

    @abstractmethod
    def __call__(self, x: Tensor) -> Features:
        """Map x to the values of its features."""

    def write(self, x: Tensor, out: Tensor, *, add: bool) -> None:
        """Apply the function."""
        values = self._values(x)
        out.add_(values) if add else out.copy_(values)

    def pull(self, x: Tensor, grad: Tensor, *, wanted: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Evaluate once more and pull through; this also works inside an operator, where autograd rests."""

        def values(x: Tensor, *tensors: Tensor) -> Tensor:
            return (self.with_tensors(tensors) if tensors else self)._values(x)

        pull_back = torch.func.vjp(values, x, *(self.tensors if wanted else ()))[1]
        grad_x, *grads = pull_back(grad)
        return grad_x, tuple(grads) if wanted else (None,) * len(self.tensors)

    def _values(self, x: Tensor) -> Tensor:
        values = self(x).values
        assert values is not None
        return values


@dataclass(frozen=True, eq=False)
class Generalized(Pointwise):
    """f(W x) + epsilon, or f(x) + epsilon (2009.14794, eq. 5); the tensor, if any, is W `(g, m, d)`."""

    activation: str = "relu"
    epsilon: float = 0.0

    def __call__(self, x: Tensor) -> Features:
        """Apply the activation."""
        rows = x @ self.tensors[0].mT if self.tensors else x
        return Features(ACTIVATIONS[self.activation](rows) + self.epsilon, None)

    def write(self, x: Tensor, out: Tensor, *, add: bool) -> None:
        """Apply the function, to the product in place where that is as simple."""
        if add or not self.tensors or self.activation not in IN_PLACE:
            return super().write(x, out, add=add)
        IN_PLACE[self.activation][0](torch.bmm(x, self.tensors[0].mT, out=out)).add_(self.epsilon)

    def pull(self, x: Tensor, grad: Tensor, *, wanted: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Pull by the derivative where that is simple, else by autograd."""
        if not self.tensors or self.activation not in IN_PLACE:
            return super().pull(x, grad, wanted=wanted)
        (weight,) = self.tensors
        grad = IN_PLACE[self.activation][1](grad, torch.bmm(x, weight.mT))
        return torch.bmm(grad, weight), (torch.bmm(grad.mT, x) if wanted else None,)


@dataclass(frozen=True, eq=False)
class Taylor(Pointwise):
    """[1, y, y_i y_j / sqrt 2] of y = scale * x, or of y = W x where there is a tensor W `(g, d', d)`.

    Their products are 1 + s + s^2 / 2 >= 1/2 at s = y.y' (Based, 2402.18668). The symmetric half of the squares is
    packed away: m = 1 + d + d (d + 1) / 2.
    """

    scale: float = 1.0

    def __call__(self, x: Tensor) -> Features:
        """Map x to its products."""
        x = x @ self.tensors[0].mT if self.tensors else self.scale * x
        rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        weight = torch.where(rows == columns, math.sqrt(0.5), 1.0).to(x.dtype)
        squares = x[..., rows] * x[..., columns] * weight
        return Features(torch.cat([torch.ones_like(x[..., :1]), x, squares], dim=-1), None)


def optimal_damping(mean_square: Tensor, dim: int) -> Tensor:
    """Return the A that minimises the variance when |x + y|^2 is `mean_square` on average (2205.15317, theorem 3.4).

    It is never positive, and 0, which is FAVOR+, where all vectors vanish.
    """
    ratio = 2.0 * mean_square / dim
    return (1.0 - ratio - torch.sqrt((ratio + 1.0).square() + 4.0 * ratio)) / 16.0
