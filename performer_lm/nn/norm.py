"""Normalisation of the residual stream and of heads, with statistics in float32."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from performer_lm.ops.precision import widen
from performer_lm.ranges import Count, NotNegative, Positive, ranged


@ranged
class RMSNorm(nn.Module):
    """Scale the last axis to unit root mean square, then by a learned gain (arXiv 1910.07467)."""

    def __init__(self, dim: Count, *, eps: NotNegative = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim)` to `(..., dim)` in x's dtype."""
        return F.rms_norm(widen(x), self.gain.shape, widen(self.gain), self.eps).to(x.dtype)


@ranged
class LayerNorm(nn.Module):
    """Centre and scale the last axis, with learned gain and offset (arXiv 1607.06450)."""

    def __init__(self, dim: Count, *, eps: NotNegative = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(dim))
        self.offset = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim)` to `(..., dim)` in x's dtype."""
        gain, offset = widen(self.gain), widen(self.offset)
        return F.layer_norm(widen(x), self.gain.shape, gain, offset, self.eps).to(x.dtype)


@ranged
class ScaleNorm(nn.Module):
    """Scale the last axis to one learned length, at first sqrt(dim) (arXiv 1910.05895)."""

    def __init__(self, dim: Count, *, eps: NotNegative = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.tensor([math.sqrt(dim)]))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim)` to `(..., dim)` in x's dtype; vectors shorter than `eps` are not scaled up further."""
        wide = widen(x)
        return (wide * (self.gain / wide.norm(dim=-1, keepdim=True).clamp(min=self.eps))).to(x.dtype)


class NoNorm(nn.Module):
    """Return the stream unchanged, as ReZero does (arXiv 2003.04887)."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


@ranged
class QueryKeyNorm(nn.Module):
    """Make a head's logits a bounded, learned temperature times the cosine of query and key (arXiv 2010.04245).

    Queries and keys get the length (temperature^2 d)^1/4, so that q.k / sqrt(d) is temperature * cosine. Random
    features estimate softmax well only for short vectors (FAVOR's relative variance is (e^(|q + k|^2 / sqrt d) - 1) /
    m): the bound keeps them short.

    Args:
        key_heads: each has a temperature of its own, which its queries share.
        dim_head: width d of a head.
        bound: temperatures stay below the bound and start at half of it.

    Raises:
        ValueError: for a bound that is not positive.
    """

    def __init__(self, *, key_heads: int, dim_head: int, bound: Positive) -> None:
        super().__init__()
        self.bound = bound
        self.root_width = dim_head**0.25
        self.logit = nn.Parameter(torch.zeros(key_heads))

    def forward(self, x: Tensor) -> Tensor:
        """Scale queries `(b, h, i, d)` or keys `(b, g, j, d)` to the learned length, in the same dtype."""
        length = (self.bound * widen(self.logit).sigmoid()).sqrt() * self.root_width
        each = length.repeat_interleave(x.shape[1] // len(length))
        return (F.normalize(widen(x), dim=-1) * rearrange(each, "h -> h 1 1")).to(x.dtype)
