"""Feature maps phi whose dot products stand in for a kernel: phi(x) . phi(y) ~ K(x, y).

A map gives `Features(values, log_scale)`, standing for values * exp(log_scale). Exponential maps live wholly in
`log_scale`, where nothing overflows or vanishes; polynomial maps live in `values`. Constant factors common to all
features (m^-1/2 and the like) are left out: normalised attention cancels them.

The functions here say what each map is; `maps.py` is how the engine evaluates them.

Letters: `n` tokens, `d` head width, `m` features.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

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
