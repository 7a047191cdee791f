"""What linear attention keeps of the keys it has seen, and how logarithms are kept exact beside it.

Letters: `b` batch (times key heads, in `rebase`), `g` key heads, `n` tokens, `m` features, `e` value width.
"""

from math import log2
from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.maps import LOG2_E, precise

EMPTY = -(2.0**100)
"""The exponent of nothing: so low that any key outweighs it, yet finite, so that differences stay numbers."""


BLOCK = 1 << 18
"""Features (of all tokens, heads and sequences) of a block with a backward, where its tokens are not given.

Caches hold four times as many, but a backward has their gradients, scores and copies beside them.
"""


class LinearState(NamedTuple):
    """The sums of phi(k) [v, 1] over 2^exponent, per feature."""

    sums: Tensor  # (b, g, m, e + 1)
    exponent: Tensor  # (b, g, m), float64: near log2 of the largest feature of the keys


def empty_state(
    batch: int, key_heads: int, num_features: int, dim_value: int, *, device: torch.device, dtype: torch.dtype
) -> LinearState:
    """Return the state of no keys, with sums in float32 unless `dtype` is wider."""
    dtype = torch.promote_types(dtype, torch.float32)
    sums = torch.zeros(batch, key_heads, num_features, dim_value + 1, device=device, dtype=dtype)
    return LinearState(sums, torch.full_like(sums[..., 0], EMPTY, dtype=precise(device)))


def block_tokens(state: LinearState, *, backward: bool) -> int:
    """Return how many tokens make a good block, a power of two from 64 to 512; fewer if a `backward` follows."""
    b, g, m, _ = state.sums.shape
    features = BLOCK if backward else 4 * BLOCK
    return min(max(64, 2 ** round(log2(features / max(1, b * g * m)))), 512)


class Rebased(NamedTuple):
    """Logarithms relative to an origin near them, in units of log 2: float32 is finest near zero."""

    shift: Tensor | None  # (b, n, 1), at most 0: what belongs to all features of a token; None for nothing
    before: Tensor  # (b, 1, m): the state's exponent
    origin: Tensor | None  # (b, 1, 1)

    def absolute(self, scale: Tensor) -> Tensor:
        """Return a scale `(b, 1, m)` as an exponent `(b, m)`."""
        wide = scale.to(self.before.dtype)[:, 0]
        return wide if self.origin is None else wide + self.origin[:, 0]


def rebase(gain: Tensor | None, exponent: Tensor) -> Rebased:
    """Put gains of tokens `(b, n)`, in natural logarithms, and an exponent `(b, m)` on the largest gain as origin."""
    if gain is None:
        return Rebased(None, exponent[:, None], None)
    gain = LOG2_E * gain.to(exponent.dtype)[..., None]
    origin = gain.detach().amax(dim=1, keepdim=True)
    return Rebased(gain - origin, exponent[:, None] - origin, origin)


def add_gains(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Add what may be missing."""
    return one if other is None else other if one is None else one + other
