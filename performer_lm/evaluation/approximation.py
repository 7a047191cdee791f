"""How well random features stand in for softmax: errors, effective numbers, and the attention matrix they imply.

All functions are pure and take q, k, v of one layer, as the backend receives them; results are per head.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `i` queries, `j` keys, `d` head width, `e`
value width, `m` features.
"""

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from performer_lm.attention.favor import FavorAttention
from performer_lm.ops.features import Features
from performer_lm.ops.softmax import no_autocast


class Approximation(NamedTuple):
    """What `measure_approximation` finds, each `(h,)`."""

    relative_error: Tensor
    """|favor - exact| / |exact| of the outputs, in Frobenius norms over batch, tokens and values."""
    total_variation: Tensor
    """Half the absolute difference of the two rows of weights, 0 (equal) to 1, averaged over queries."""
    uniform_total_variation: Tensor
    """The same of equal weights against softmax: what an estimate must beat to be worth more than averaging."""
    effective_features: Tensor
    """How many of the m features carry a weight: 1 / sum of squared shares, averaged over pairs in sight."""
    query_norm: Tensor
    """Mean |q| d^-1/4, the length that features see."""
    key_norm: Tensor
    """Mean |k| d^-1/4."""


def measure_approximation(
    attention: FavorAttention, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True
) -> Approximation:
    """Compare FAVOR attention with softmax on one layer's own vectors, in O(i j m) time and O(i j) memory.

    Args:
        attention: whose features.
        q: `(b, h, i, d)`.
        k: `(b, g, j, d)`.
        v: `(b, g, j, e)`.
        causal: end-aligned.
    """
    with torch.no_grad(), no_autocast(q.device):
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        implied, effective = _compare_pairs(attention, q, k, causal=causal)
        exact = exact_weights(q, k, causal=causal)
        visible = _visible(exact, causal=causal)
        uniform = visible / visible.sum(dim=-1, keepdim=True).clamp(min=1.0)
        group = q.shape[1] // k.shape[1]
        out, expected = (weights @ v.repeat_interleave(group, dim=1) for weights in (implied, exact))
        scale = q.shape[-1] ** -0.25
        return Approximation(
            relative_error=_size(out - expected) / _size(expected),
            total_variation=_total_variation(implied, exact),
            uniform_total_variation=_total_variation(uniform.expand_as(exact), exact),
            effective_features=reduce(effective * visible, "b h i j -> h", "sum") / (visible.sum() * q.shape[0]),
            query_norm=reduce(q.norm(dim=-1), "b h i -> h", "mean") * scale,
            key_norm=reduce(k.norm(dim=-1), "b g j -> g", "mean").repeat_interleave(group) * scale,
        )


def implied_weights(attention: FavorAttention, q: Tensor, k: Tensor, *, causal: bool = True) -> Tensor:
    """Materialise the attention matrix that the features imply: phi(q_i) . phi(k_j), normalised over j.

    Args:
        attention: whose features.
        q: `(b, h, i, d)`.
        k: `(b, g, j, d)`.
        causal: end-aligned.

    Returns:
        `(b, h, i, j)`; choose heads by indexing it. Rows of signed features may hold negative weights.
    """
    with torch.no_grad(), no_autocast(q.device):
        return _compare_pairs(attention, q, k, causal=causal)[0]


def exact_weights(q: Tensor, k: Tensor, *, causal: bool = True) -> Tensor:
    """Return the softmax weights of q `(b, h, i, d)` and k `(b, g, j, d)`: `(b, h, i, j)`."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * q.shape[-1] ** -0.5
    visible = _visible(scores, causal=causal) > 0
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)


def _visible(scores: Tensor, *, causal: bool) -> Tensor:
    """Return `(i, j)`: 1 where query i sees key j, the last query standing at the last key."""
    i, j = scores.shape[-2:]
    visible = scores.new_ones(i, j)
    return visible.tril(j - i) if causal else visible


def _compare_pairs(attention: FavorAttention, q: Tensor, k: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the implied weights and the effective number of features of each pair, `(b, h, i, j)` both."""
    b, g = k.shape[:2]
    q, k, log_gain = attention.features.prepare(q, k)
    query_map, key_map = (a_map.spread(b, q.dtype) for a_map in attention.features.maps())
    r, i = q.shape[1] // g, q.shape[2]
    queries = query_map(rearrange(q, "b (g r) i d -> (b g) (r i) d", g=g))
    keys = key_map(k.flatten(0, 1))
    if log_gain is not None and keys.log_scale is not None:
        keys = keys._replace(log_scale=keys.log_scale + log_gain.flatten(0, 1)[..., None])
    visible = _visible(q.new_empty(i, k.shape[2]), causal=causal).repeat(r, 1)
    weights, effective = [], []
    for row in range(r * i):  # one query at a time: the products of all would be i x j x m
        terms, peak = _terms(queries, keys, row)
        total, size = terms.sum(dim=-1), terms.abs().sum(dim=-1)
        effective.append(size.square() / terms.square().sum(dim=-1))
        peak = peak.masked_fill(visible[row] == 0, -torch.inf)
        seen = total * (peak - peak.amax(dim=-1, keepdim=True)).exp() * visible[row]
        weights.append(seen / seen.sum(dim=-1, keepdim=True))
    stacked = (torch.stack(x, dim=1) for x in (weights, effective))
    one, other = (rearrange(x, "(b g) (r i) j -> b (g r) i j", b=b, r=r) for x in stacked)
    return one, other


def _terms(queries: Features, keys: Features, row: int) -> tuple[Tensor, Tensor]:
    """Return one query's products with every key, feature by feature, over exp(peak): `(b, j, m)` and `(b, j)`."""
    values = None
    if queries.values is not None and keys.values is not None:
        values = queries.values[:, row, None] * keys.values
    if queries.log_scale is None or keys.log_scale is None:
        assert values is not None
        return values, values.new_zeros(values.shape[:-1])
    logs = queries.log_scale[:, row, None] + keys.log_scale
    peak = logs.amax(dim=-1)
    weights = (logs - peak[..., None]).exp()
    return weights if values is None else weights * values, peak


def _size(x: Tensor) -> Tensor:
    return reduce(x.square(), "b h i e -> h", "sum").sqrt()


def _total_variation(one: Tensor, other: Tensor) -> Tensor:
    return 0.5 * reduce((one - other).abs().sum(dim=-1), "b h i -> h", "mean")
