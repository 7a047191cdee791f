"""One block of causal linear attention at any loudness: the exact form that asks nothing of its input.

The late half of a block reads the keys of its early half at *their* scale, then each half is treated likewise, down to
single tokens. Every scale that a query meets comes from keys before it, so no later key can make an earlier one vanish,
and decay only ever adds to logarithms. It costs log2(c) passes over the features where `dense.py` needs one.

Letters: `b` batch times key heads, `r` queries per key, `c` tokens of the block, `u` stretches of it, `s` tokens of
half a stretch, `m` features, `e` value width; values come as [v, 1], so that the last column sums the denominators.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from performer_lm.ops.linear.fading import Times, sum_later

EMPTY = -1e30
"""The log scale of nothing: so low that any key outweighs it, yet finite, so that differences stay numbers."""


class Block(NamedTuple):
    """What one block is made of, features in log space."""

    queries: Tensor  # (b, r, c, m)
    keys: Tensor  # (b, c, m); -inf where masked
    values: Tensor  # (b, c, e + 1)
    times: Times


class Found(NamedTuple):
    """What queries have gathered so far: sums of weight times [v, 1] over exp(peak)."""

    peak: Tensor  # (b, r, ..., 1)
    weighted: Tensor  # (b, r, ..., e + 1)


def attend_halves(block: Block, sums: Tensor, log_scale: Tensor, *, own: bool = True) -> Found:
    """Let each token of a block see the state `(b, m, e + 1)`, `(b, m)` and the block's tokens before it.

    It sees its own key too, unless `own` is False.
    """
    c = block.keys.shape[-2]
    half = (1 << (c - 1).bit_length()) // 2
    whole = _padded(block, max(1, 2 * half))
    found = _read_state(whole, sums, log_scale)
    found = join(found, _read_own(whole)) if own else found
    while half:
        found = _read_early_half(whole, half, found)
        half //= 2
    return Found(*(x[..., :c, :] for x in found))


def fade_to_end(block: Block, sums: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys' log features, the sums and their log scale as they stand at the end of the block."""
    keys, (log_decay, documents) = block.keys, block.times
    if log_decay is not None:
        keys = keys + sum_later(log_decay)[..., None]
        log_scale = log_scale + log_decay.detach().sum(dim=-1, keepdim=True)
        sums = sums * (log_decay - log_decay.detach()).sum(dim=-1).exp()[:, None, None]  # 1, for the gradient
    if documents is not None:
        last = documents[:, -1:]
        keys = keys.masked_fill((documents[:, 1:] != last)[..., None], -torch.inf)
        log_scale = log_scale.masked_fill(documents[:, :1] != last, EMPTY)
        sums = sums * (documents[:, :1] == last)[..., None]
    return keys, sums, log_scale


def scaled_exp(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(logs - peak) and the peak over features, `(..., m)` and `(..., 1)`."""
    peak = logs.detach().amax(dim=-1, keepdim=True)
    return (logs - peak).exp(), peak


def join(one: Found, other: Found) -> Found:
    """Add what was found in two places."""
    peak = torch.maximum(one.peak, other.peak)
    return Found(peak, (one.peak - peak).exp() * one.weighted + (other.peak - peak).exp() * other.weighted)


def _padded(block: Block, width: int) -> Block:
    """Lengthen a block to `width` tokens by masked ones at its end."""
    extra = width - block.keys.shape[-2]
    log_decay, documents = block.times
    if log_decay is not None:
        log_decay = pad(log_decay, (0, extra))
    if documents is not None:
        documents = torch.cat([documents, documents[:, -1:].expand(-1, extra)], dim=-1)
    return Block(
        queries=pad(block.queries, (0, 0, 0, extra)),
        keys=pad(block.keys, (0, 0, 0, extra), value=-torch.inf),
        values=pad(block.values, (0, 0, 0, extra)),
        times=Times(log_decay, documents),
    )


def _read_own(block: Block) -> Found:
    """Read each token's own key."""
    masked = block.keys == -torch.inf
    keys = block.keys.masked_fill(masked, EMPTY)
    logs = (block.queries + keys[:, None]).logsumexp(dim=-1, keepdim=True)
    peak = logs.detach()
    return Found(peak, (logs - peak).exp() * block.values.masked_fill(masked[..., :1], 0.0)[:, None])


def _only(found: Found, follows: Tensor) -> Found:
    """Drop what queries of another document found; `follows` broadcasts to `(b, r, ..., 1)`."""
    return Found(found.peak.masked_fill(~follows, EMPTY), found.weighted * follows)


def _read_state(block: Block, sums: Tensor, log_scale: Tensor) -> Found:
    """Read what came before the block."""
    logs = block.queries + log_scale[:, None, None]
    if block.times.log_decay is not None:
        logs = logs + block.times.log_decay.cumsum(dim=-1)[:, None, :, None]
    weights, peak = scaled_exp(logs)
    found = Found(peak, weights @ sums[:, None])
    if block.times.documents is not None:
        found = _only(found, (block.times.documents[:, 1:] == block.times.documents[:, :1])[:, None, :, None])
    return found


def _read_early_half(block: Block, half: int, found: Found) -> Found:
    """In each stretch of 2 `half` tokens, let the late half read the early half's keys at the early half's scale."""
    queries = rearrange(block.queries, "b r (u t s) m -> t b r u s m", t=2, s=half)[1]
    keys = rearrange(block.keys, "b (u t s) m -> t b u s m", t=2, s=half)[0]
    values = rearrange(block.values, "b (u t s) e -> t b u s e", t=2, s=half)[0]
    if block.times.log_decay is not None:
        early, late = rearrange(block.times.log_decay, "b (u t s) -> t b u s", t=2, s=half)
        keys = keys + sum_later(early)[..., None]
        queries = queries + late.cumsum(dim=-1)[:, None, ..., None]
    follows = None
    if block.times.documents is not None:
        early, late = rearrange(block.times.documents[:, 1:], "b (u t s) -> t b u s", t=2, s=half)
        keys = keys.masked_fill((early != early[..., -1:])[..., None], -torch.inf)
        follows = (late == early[..., -1:])[:, None, ..., None]
    scale = keys.detach().amax(dim=-2, keepdim=True).clamp(min=EMPTY)
    weights, peak = scaled_exp(queries + scale[:, None])
    more = Found(peak, (weights @ (keys - scale).exp().mT[:, None]) @ values[:, None])
    more = more if follows is None else _only(more, follows)
    early_found, late_found = zip(
        *(rearrange(x, "b r (u t s) e -> t b r u s e", t=2, s=half) for x in found), strict=True
    )
    joined = zip(early_found, join(Found(*late_found), more), strict=True)
    return Found(*(rearrange(torch.stack(both), "t b r u s e -> b r (u t s) e") for both in joined))
