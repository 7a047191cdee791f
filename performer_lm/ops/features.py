"""Feature maps phi whose dot products stand in for a kernel: phi(x) . phi(y) ~ K(x, y).

A map gives `Features(values, log_scale)`, standing for values * exp(log_scale). Exponential maps live wholly in
`log_scale`, where nothing overflows or vanishes; polynomial maps live in `values`. Constant factors common to all
features (m^-1/2 and the like) are left out: normalised attention cancels them.

The functions say what each map is; a `FeatureMap` is how `linear.py` evaluates one, and a `BlockMap` how the causal
engine evaluates it on a block of tokens and pulls a gradient back, so that features never outlive their block.

Letters: `b` batch times key heads, `g` key heads, `n` tokens, `d` head width, `m` features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

# the sums |x|^2 / 2 of long vectors need more than float32 holds, if a weight e^(w.x - |x|^2 / 2) is to have 5 digits
_GAIN_DTYPE = torch.float64

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
"""What a generalized kernel may apply, by name."""

POSITIVE = frozenset({"abs", "elu", "exp", "relu", "relu_squared", "sigmoid", "softplus", "square"})
"""The activations that never go below zero, so that their attention is an average and may be causal."""


class Features(NamedTuple):
    """The features values * exp(log_scale) of n tokens, `(..., n, m)`; None stands for values 1 or log scale 0."""

    values: Tensor | None
    log_scale: Tensor | None


def exponential(x: Tensor, projection: Tensor, *, damping: float = 0.0) -> Features:
    """Map `(..., n, d)` by `(..., m, d)` to exp(A |w|^2 + B w.x - |x|^2 / 2), `(..., n, m)`, in log space.

    With A = `damping` = 0 these are FAVOR+'s positive features (2009.14794, lemma 1); with A < 0, B = sqrt(1 - 4A),
    the bounded ones of FAVOR++ (2205.15317, with D = (1 - 4A)^(d/4) left out). Rows [w, -w] make them hyperbolic.
    """
    scale = math.sqrt(1.0 - 4.0 * damping)
    log_scale = (x @ (scale * projection).mT) - 0.5 * x.square().sum(dim=-1, keepdim=True)
    if damping:
        log_scale = log_scale + damping * projection.square().sum(dim=-1)[..., None, :]
    return Features(None, log_scale)


def optimal_damping(mean_square: Tensor, dim: int) -> Tensor:
    """Return the A that minimises the variance when |x + y|^2 is `mean_square` on average (2205.15317, theorem 3.4).

    It is never positive, and 0, which is FAVOR+, where all vectors vanish.
    """
    ratio = 2.0 * mean_square / dim
    return (1.0 - ratio - torch.sqrt((ratio + 1.0).square() + 4.0 * ratio)) / 16.0


def trigonometric(x: Tensor, projection: Tensor) -> Features:
    """Map to exp(|x|^2 / 2) [cos w.x, sin w.x], `(..., n, 2m)` (2009.14794, eq. 4): unbiased but signed."""
    angles = x @ projection.mT
    log_scale = 0.5 * x.square().sum(dim=-1, keepdim=True)
    return Features(
        torch.cat([angles.cos(), angles.sin()], dim=-1), log_scale.expand(*x.shape[:-1], 2 * angles.shape[-1])
    )


def second_order_taylor(x: Tensor) -> Features:
    """Map to [1, x, x_i x_j / sqrt 2], whose products are 1 + s + s^2 / 2 >= 1/2 at s = x.y (Based, 2402.18668).

    `(..., n, d)` -> `(..., n, 1 + d + d (d + 1) / 2)`; the symmetric half of the squares is packed away.
    """
    rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = torch.where(rows == columns, math.sqrt(0.5), 1.0).to(x.dtype)
    squares = x[..., rows] * x[..., columns] * weight
    return Features(torch.cat([torch.ones_like(x[..., :1]), x, squares], dim=-1), None)


def generalized(x: Tensor, projection: Tensor | None, *, activation: str, epsilon: float) -> Features:
    """Map to f(W x) + epsilon, or f(x) + epsilon without a projection (2009.14794, eq. 5)."""
    rows = x if projection is None else x @ projection.mT
    return Features(ACTIVATIONS[activation](rows) + epsilon, None)


@dataclass(frozen=True, eq=False)
class FeatureMap(ABC):
    """A map as the engine uses it: on x `(b, n, d)`, with tensors `(b, ...)` that gradients may reach.

    Maps are built with tensors `(g, ...)`, one entry per key head; `spread` repeats them over the batch.
    """

    tensors: tuple[Tensor, ...]

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """Return the same map over other tensors."""
        return replace(self, tensors=tensors)

    def spread(self, batch: int, dtype: torch.dtype) -> Self:
        """Repeat tensors `(g, ...)` to `(batch g, ...)` in `dtype`."""
        tensors = tuple(t.to(dtype) for t in self.tensors)
        if batch > 1:
            tensors = tuple(t.repeat(batch, *(1,) * (t.ndim - 1)) for t in tensors)
        return self.with_tensors(tensors)

    @abstractmethod
    def __call__(self, x: Tensor) -> Features:
        """Map x `(b, n, d)` to its features."""


@dataclass(frozen=True, eq=False)
class Trigonometric(FeatureMap):
    """`trigonometric` features of scale * x; the tensor is W `(g, m, d)`."""

    scale: float = 1.0

    def __call__(self, x: Tensor) -> Features:
        """Map x to `2 m` features."""
        return trigonometric(self.scale * x, *self.tensors)


@dataclass(frozen=True, eq=False)
class BlockMap(FeatureMap):
    """A map without negative features, which the causal engine evaluates, and pulls back, block by block."""

    logarithmic: bool = True

    @abstractmethod
    def rows(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return log features if `logarithmic`, else features, `(b, n, m)`, plus a shift `(b, 1 or n, 1 or m)`."""

    def gain(self, x: Tensor) -> Tensor | None:
        """Return what is to be added to all log features of a token, `(b, n)`, in a precise dtype."""
        del x
        return None

    @abstractmethod
    def pull(self, x: Tensor, grad: Tensor, wanted: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Turn the gradient at rows + gain into those at x and, if `wanted`, at the tensors."""

    def __call__(self, x: Tensor) -> Features:
        """Map x to its features."""
        rows, gain = self.rows(x), self.gain(x)
        if not self.logarithmic:
            return Features(rows, None)
        return Features(None, rows if gain is None else rows + gain[..., None].to(rows.dtype))


@dataclass(frozen=True, eq=False)
class Exponential(BlockMap):
    """Log features scale W x + bias - norm |x|^2; the tensors are W `(g, m, d)` and, if any, the bias `(g, m)`."""

    scale: float = 1.0
    norm: float = 0.0

    def rows(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Project in one matrix product, with scale, shift and bias."""
        weight, *bias = self.tensors
        for more in bias:
            shift = more[:, None] if shift is None else shift + more[:, None]
        return self._multiply(x, weight.mT, shift)

    def gain(self, x: Tensor) -> Tensor | None:
        """Return -norm |x|^2."""
        return x.square().sum(dim=-1, dtype=_GAIN_DTYPE) * -self.norm if self.norm else None

    def pull(self, x: Tensor, grad: Tensor, wanted: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Pull by two matrix products."""
        weight, *bias = self.tensors
        grad_x = self._multiply(grad, weight)
        if self.norm:
            grad_x.addcmul_(x, grad.sum(dim=-1, keepdim=True), value=-2.0 * self.norm)
        if not wanted:
            return grad_x, (None,) * len(self.tensors)
        return grad_x, (self._multiply(grad.mT, x), *(grad.sum(dim=1) for _ in bias))

    def _multiply(self, one: Tensor, other: Tensor, shift: Tensor | None = None) -> Tensor:
        if shift is None:
            return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=self.scale)
        return torch.baddbmm(shift, one, other, alpha=self.scale)


@dataclass(frozen=True, eq=False)
class Pointwise(BlockMap):
    """Any function of x and the tensors; gradients come from autograd, block by block."""

    logarithmic: bool = False
    function: Callable[..., Tensor] = torch.relu

    def rows(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Apply the function."""
        rows = self.function(x, *self.tensors)
        return rows if shift is None else rows + shift

    def pull(self, x: Tensor, grad: Tensor, wanted: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Evaluate once more under autograd and pull through."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ((x, *self.tensors) if wanted else (x,))]
            rows = self.function(leaves[0], *(leaves[1:] if wanted else self.tensors))
            grads = torch.autograd.grad(rows, leaves, grad)
        return grads[0], grads[1:] if wanted else (None,) * len(self.tensors)
