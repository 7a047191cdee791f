"""The errors of one layer's features against softmax, their effective number, and the attention matrix they imply.

Functions are pure and take q, k, v as the backend receives them; results are per head.

Letters: `b` batch, `h` heads, `g` key heads, `i` queries, `j` keys, `d` head width, `e` value width, `m` features.
"""

from typing import NamedTuple, Unpack

import torch
from einops import reduce
from torch import Tensor

from performer_lm.attention.favor import FavorAttention
from performer_lm.evaluation.approximation.pairs import Pairs, Sight, where_precise
from performer_lm.ops.precision import no_autocast, widen


class Approximation(NamedTuple):
    """Errors of features against softmax, each `(h,)`."""

    relative_error: Tensor
    """|favor - exact| / |exact| of the outputs, in Frobenius norms over batch, tokens and values."""
    matrix_error: Tensor
    """The same of the attention matrices."""
    total_variation: Tensor
    """Half the absolute difference of the two rows of weights, 0 (equal) to 1, averaged over queries."""
    uniform_total_variation: Tensor
    """The same of weights that know nothing of q and k: what an estimate must beat to be worth more than averaging."""
    effective_features: Tensor
    """How many of the m features carry a weight: 1 / sum of squared shares, averaged over pairs in sight."""
    query_norm: Tensor
    """Mean |q| d^-1/4, the length that features see."""
    key_norm: Tensor
    """Mean |k| d^-1/4."""


def measure_approximation(
    attention: FavorAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: int | None = None,
    **sight: Unpack[Sight],
) -> Approximation:
    """Compare FAVOR attention with softmax on one layer's own vectors, in O(i j m) time and O((i + j) m) memory.

    Args:
        attention: whose features.
        q: `(b, h, i, d)`.
        k: `(b, g, j, d)`.
        v: `(b, g, j, e)`.
        queries: how many queries to look at, evenly spaced and the last among them; None for all.
        sight: which keys a query sees, for both alike.
    """
    with torch.no_grad(), no_autocast(q.device):
        attention, (q, k, v), sight = where_precise(attention, (q, k, v), sight)
        q, k, v = (widen(x) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        pairs = Pairs(attention, q, k, queries=queries, **sight)
        values = v.repeat_interleave(group, dim=1)
        totals = q.new_zeros(8, q.shape[1], dtype=torch.float64)
        for block in pairs.blocks():
            expected = block.exact @ values
            totals += torch.stack(
                [
                    _per_head((block.implied @ values - expected).square()),
                    _per_head(expected.square()),
                    _per_head((block.implied - block.exact).square()),
                    _per_head(block.exact.square()),
                    _per_head((block.implied - block.exact).abs()),
                    _per_head((block.faded - block.exact).abs()),
                    _per_head(block.effective * block.visible),
                    _per_head(block.visible.to(q.dtype)),
                ]
            )
        error, size, distance, length, variation, uniform, effective, seen = totals
        scale, looked = q.shape[-1] ** -0.25, 2 * q.shape[0] * len(pairs.rows)
        return Approximation(
            relative_error=(error / size).sqrt(),
            matrix_error=(distance / length).sqrt(),
            total_variation=variation / looked,
            uniform_total_variation=uniform / looked,
            effective_features=effective / seen,
            query_norm=reduce(q.norm(dim=-1), "b h i -> h", "mean") * scale,
            key_norm=reduce(k.norm(dim=-1), "b g j -> g", "mean").repeat_interleave(group) * scale,
        )


class Weights(NamedTuple):
    """Attention matrices of the same queries and keys, `(b, h, i, j)` each."""

    implied: Tensor
    """phi(q_i) . phi(k_j), normalised over j; rows of signed features may hold negative weights."""
    exact: Tensor
    """Softmax's."""


def materialise_weights(attention: FavorAttention, q: Tensor, k: Tensor, **sight: Unpack[Sight]) -> Weights:
    """Write out the attention matrix that the features imply, and softmax's beside it; choose heads by indexing them.

    Args as of `measure_approximation`.
    """
    with torch.no_grad(), no_autocast(q.device):
        attention, (q, k), sight = where_precise(attention, (q, k), sight)
        q, k = (widen(x) for x in (q, k))
        found = [(block.implied, block.exact) for block in Pairs(attention, q, k, **sight).blocks()]
    return Weights(*(torch.cat(blocks, dim=2) for blocks in zip(*found, strict=True)))


def _per_head(x: Tensor) -> Tensor:
    return reduce(x, "b h i j -> h", "sum").double()
