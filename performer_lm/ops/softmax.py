"""Softmax attention with its n x n matrix: the reference that every other form is held against.

Letters: `b` batch, `h` heads, `g` key heads, `r` query heads per key head, `i` queries, `j` keys, `d` head width, `e`
value width.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from performer_lm.ops.checks import fold_heads, gather_terms
from performer_lm.ops.precision import no_autocast, sum_dtype
from performer_lm.ops.terms import ALL, Block, Terms


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | Block | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | Block | None = None,
    segments: Tensor | None = None,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Attend by softmax(scale q k + bias) v, in O(i j) time and memory.

    Sums and softmax are float32 or wider. A query that sees no key gets zeros.

    Args:
        q: `(..., h, i, d)`, with any leading batch dimensions, or none.
        k: `(..., g, j, d)`, where g divides h: query head x reads key head x // (h / g).
        v: `(..., g, j, e)`.
        causal: a query sees the keys up to its own place; the last query stands at the last key.
        window: see only keys less than `window` places away (kept keys, with a `key_mask`).
        mask: bool or integer that broadcasts to `(..., h, i, j)`, True or 1 keeps; or a function of (query slice, key
            slice) to one.
        key_mask: `(..., j)` bool or integer, True or 1 keeps: the others are as if absent, whatever (finite)
            numbers they hold.
        bias: added to the scores, broadcasts to `(..., h, i, j)`; or a function of (query slice, key slice).
        segments: `(..., j)` int document ids of the keys; the queries are the last i of them. Tokens see their own
            document only.
        log_decay: `(..., g, j)`, at most 0, causal only: adds sum of log_decay over j+1..i to score (i, j).
        scale: of the scores, d ** -0.5 by default.
        dropout: chance that a probability is dropped, a function of (seed, b, h, i, j) (`keep_mask`).
        seed: of the dropout.

    Returns:
        `(..., h, i, e)` in q's dtype.

    Raises:
        ValueError: for shapes or dtypes that do not fit, log_decay without causal, dropout without a seed.

    Examples:
        >>> import torch
        >>> from performer_lm.ops import exact_attention
        >>> q, k, v = torch.randn(3, 2, 5, 8, 10, 16).unbind()
        >>> exact_attention(q, k, v, causal=True).shape
        torch.Size([2, 5, 8, 10, 16])
    """
    terms = gather_terms(
        q,
        k,
        v,
        causal=causal,
        window=window,
        mask=mask,
        key_mask=key_mask,
        bias=bias,
        segments=segments,
        log_decay=log_decay,
        scale=scale,
        dropout=dropout,
        seed=seed,
    )
    with no_autocast(q.device):
        out = attend(*fold_heads(q, k, v, dtype=sum_dtype(q, k, v)), terms)
    return out.reshape(*q.shape[:-1], v.shape[-1]).to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, terms: Terms, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return softmax(scale q k + terms) v: `(b h i e)`.

    Args:
        q: `(b, h, i, d)`, widened to the dtype of sums.
        k: `(b, g, j, d)`.
        v: `(b, g, j, e)`.
        terms: the options of the call.
        own: scores `(b, h, i, s)` and values `(b, g, i, s, e)` of s keys more, which each query has to itself.
    """
    groups, keys = k.shape[1:3]
    queries = rearrange(q * terms.scale, "b (g r) i d -> b g r i d", g=groups)
    scores = einsum(queries, k, "b g r i d, b g j d -> b g r i j")
    scores = terms.add_to(rearrange(scores, "b g r i j -> b (g r) i j"), ALL, ALL)
    if own is not None:
        scores = torch.cat((scores, own[0]), dim=-1)
    sees_none = None
    if terms.may_hide_rows:  # a row of -inf alone has no softmax; as a row of zeros it has one, whose output is dropped
        sees_none = scores.isneginf().all(-1, keepdim=True)
        scores.masked_fill_(sees_none, 0.0)
    weights = scores.softmax(-1)
    if terms.dropout > 0.0:
        weights = weights * terms.kept(weights, ALL, ALL)
    weights = rearrange(weights, "b (g r) i j -> b g r i j", g=groups)
    out = einsum(weights[..., :keys], v, "b g r i j, b g j e -> b g r i e")
    if own is not None:
        out = out + einsum(weights[..., keys:], own[1], "b g r i s, b g i s e -> b g r i e")
    out = rearrange(out, "b g r i e -> b (g r) i e")
    return out if sees_none is None else out.masked_fill(sees_none, 0.0)
