"""One block of causal linear attention at any loudness: the exact form that asks nothing of its input.

The late half of a block reads the keys of its early half at *their* scale, then each half is treated likewise, down to
single tokens. Every scale that a query meets comes from keys before it, so no later key can make an earlier one vanish,
and decay only ever adds to logarithms. One offset per query, the largest weight it has in sight, makes all it finds add
up: what vanishes below that is nothing beside it.

It costs log2(n) passes over the features where `dense.py` needs one; nothing in it waits for a device. Logarithms are
in units of log 2.

Letters: `b` batch times key heads, `r` queries per key, `n` tokens of the block, `u` stretches of it, `s` tokens of
half a stretch, `m` features, `e` value width; values come as [v, 1], so that the last column sums the denominators.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from performer_lm.ops.linear.fading import Times, sum_later
from performer_lm.ops.linear.state import EMPTY
from performer_lm.ops.maps import LOG2_E

_LEAST = -(2.0**90)  # an offset of queries that see nothing: far above EMPTY, so that they find zeros


class Block(NamedTuple):
    """What one block is made of, features in log space."""

    queries: Tensor  # (b, n, r, m)
    keys: Tensor  # (b, n, m); -inf where masked
    values: Tensor  # (b, n, e + 1)
    times: Times


class Found(NamedTuple):
    """What queries have gathered: sums of weight times [v, 1] over 2^peak."""

    peak: Tensor  # (b, n, r, 1)
    weighted: Tensor  # (b, n, r, e + 1)


class Pulled(NamedTuple):
    """Gradients of a block, at natural logarithms of features."""

    queries: Tensor  # (b, n, r, m)
    keys: Tensor  # (b, n, m)
    values: Tensor  # (b, n, e + 1)
    sums: Tensor  # (b, m, e + 1)


class _Level(NamedTuple):
    """How the late halves of all stretches see the early ones."""

    half: int
    keys: Tensor  # (b, u, s, m): as they stand at the end of the early half
    scale: Tensor  # (b, u, 1 or s, m): their largest, as it stands at each late query

    def early(self, x: Tensor) -> Tensor:
        """View the early halves of `(b, n, ...)`: `(b, u, s, ...)`."""
        return x.unflatten(1, (-1, 2, self.half))[:, :, 0]

    def late(self, x: Tensor) -> Tensor:
        """View the late halves."""
        return x.unflatten(1, (-1, 2, self.half))[:, :, 1]


def attend_halves(block: Block, sums: Tensor, before: Tensor, *, own: bool = True) -> Found:
    """Let each token of a block see the state `(b, m, e + 1)`, `(b, 1, m)` and the block's tokens before it.

    It sees its own key too, unless `own` is False.
    """
    n = block.keys.shape[1]
    block, peak, levels = _lay_out(block, before, own)
    weights = _at_state(block, before)
    seen = (weights.flatten(1, 2) @ sums).view(*weights.shape[:3], -1)
    if own:
        seen += _at_own(block).sum(dim=-1, keepdim=True) * block.values[:, :, None]
    for level in levels:
        queries, keys = _meet(level, block)
        scores = torch.bmm(queries, keys.mT)
        more = torch.bmm(scores, level.early(block.values).flatten(0, 1))
        level.late(seen).add_(more.view_as(level.late(seen)))
    return Found(peak[:, :n], seen[:, :n])


def pull_halves(block: Block, sums: Tensor, before: Tensor, grad: Tensor, *, own: bool = True) -> Pulled:
    """Pull back the gradient at what `attend_halves` finds, `(b, n, r, e + 1)`."""
    n = block.keys.shape[1]
    block, _, levels = _lay_out(block, before, own)
    grad = pad(grad, (0, 0, 0, 0, 0, block.keys.shape[1] - n))
    weights, rows = _at_state(block, before), grad.flatten(1, 2)
    found = Pulled(
        queries=(rows @ sums.mT).view_as(weights).mul_(weights),
        keys=torch.zeros_like(block.keys),
        values=torch.zeros_like(block.values),
        sums=weights.flatten(1, 2).mT @ rows,
    )
    if own:
        weights = _at_own(block)
        found.values.add_((weights.sum(dim=-1, keepdim=True) * grad).sum(dim=2))
        weights.mul_((grad * block.values[:, :, None]).sum(dim=-1, keepdim=True))
        found.queries.add_(weights)
        found.keys.add_(weights.sum(dim=2))
    for level in levels:
        queries, keys = _meet(level, block)
        values, rows = level.early(block.values).flatten(0, 1), level.late(grad).flatten(0, 1).flatten(1, 2)
        scores, grad_scores = torch.bmm(queries, keys.mT), torch.bmm(rows, values.mT)
        for place, more in (
            (level.late(found.queries), torch.bmm(grad_scores, keys).mul_(queries)),
            (level.early(found.keys), torch.bmm(grad_scores.mT, queries).mul_(keys)),
            (level.early(found.values), torch.bmm(scores.mT, rows)),
        ):
            place.add_(more.view_as(place))
    return Pulled(found.queries[:, :n], found.keys[:, :n], found.values[:, :n], found.sums)


def absorb(block: Block, sums: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums after the block and their scale `(b, 1, m)`."""
    weights, factor, scale = _at_end(block, before)
    return torch.baddbmm(factor * sums, weights.mT, block.values), scale


def pull_absorb(block: Block, before: Tensor, grad: Tensor, found: Pulled) -> None:
    """Add to `found` what the gradient at the sums of `absorb` pulls back."""
    weights, factor, _ = _at_end(block, before)
    found.keys.add_(torch.bmm(block.values, grad.mT).mul_(weights))
    found.values.baddbmm_(weights, grad)
    found.sums.add_(factor * grad)


def join(one: Found, other: Found) -> Tensor:
    """Add what was found in two places, on the larger scale."""
    peak = torch.maximum(one.peak, other.peak)
    parts = ((found.peak - peak).exp2().to(found.weighted.dtype) * found.weighted for found in (one, other))
    return sum(parts, start=torch.zeros_like(one.weighted))


def _lay_out(block: Block, before: Tensor, own: bool) -> tuple[Block, Tensor, list[_Level]]:
    """Lengthen a block to a power of two, take each query's offset off it, and lay out the levels of halves."""
    n = block.keys.shape[1]
    block = _padded(block, 1 << (n - 1).bit_length())
    levels = list(_levels(block))
    highest = _state_scale(block, before).expand_as(block.keys)
    highest = torch.maximum(highest, block.keys) if own else highest.clone()
    for level in levels:
        late = level.late(highest)
        torch.maximum(late, level.scale, out=late)
    peak = (block.queries + highest[:, :, None]).amax(dim=-1, keepdim=True).clamp_(min=_LEAST)
    return block._replace(queries=block.queries - peak), peak, levels


def _padded(block: Block, width: int) -> Block:
    """Lengthen a block to `width` tokens by masked ones at its end."""
    extra = width - block.keys.shape[1]
    if not extra:
        return block
    log_decay, documents = block.times
    if log_decay is not None:
        log_decay = pad(log_decay, (0, extra))
    if documents is not None:
        documents = torch.cat([documents, documents[:, -1:].expand(-1, extra)], dim=-1)
    return Block(
        queries=pad(block.queries, (0, 0, 0, 0, 0, extra)),
        keys=pad(block.keys, (0, 0, 0, extra), value=-torch.inf),
        values=pad(block.values, (0, 0, 0, extra)),
        times=Times(log_decay, documents),
    )


def _levels(block: Block) -> Iterator[_Level]:
    """Yield the levels, the smallest halves first."""
    half = 1
    while half < block.keys.shape[1]:
        yield _level(block, half)
        half *= 2


def _level(block: Block, half: int) -> _Level:
    level = _Level(half, block.keys, block.keys)
    keys, later = level.early(block.keys), None
    log_decay, documents = block.times
    if log_decay is not None:
        keys = keys + LOG2_E * sum_later(level.early(log_decay))[..., None]
        later = LOG2_E * level.late(log_decay).cumsum(dim=-1)[..., None]
    if documents is not None:
        early = level.early(documents[:, 1:])
        keys = keys.masked_fill((early != early[..., -1:])[..., None], -torch.inf)
    scale = keys.amax(dim=2, keepdim=True).clamp_(min=EMPTY)
    keys = keys - scale
    if later is not None:
        scale = scale + later
    if documents is not None:
        scale = scale.masked_fill((level.late(documents[:, 1:]) != early[..., -1:])[..., None], EMPTY)
    return _Level(half, keys, scale)


def _meet(level: _Level, block: Block) -> tuple[Tensor, Tensor]:
    """Return the weights of late queries and early keys: `(b u, s r, m)` and `(b u, s, m)`."""
    queries = (level.late(block.queries) + level.scale[:, :, :, None]).exp2_()
    return queries.flatten(0, 1).flatten(1, 2), level.keys.exp2().flatten(0, 1)


def _state_scale(block: Block, before: Tensor) -> Tensor:
    """Return the state's log scale as it stands at each token: `(b, 1 or n, m)`."""
    scale = before.to(block.keys.dtype)
    if block.times.log_decay is not None:
        scale = scale + LOG2_E * block.times.log_decay.cumsum(dim=-1)[..., None]
    if block.times.documents is not None:
        documents = block.times.documents
        scale = scale.masked_fill((documents[:, 1:] != documents[:, :1])[..., None], EMPTY)
    return scale


def _at_state(block: Block, before: Tensor) -> Tensor:
    """Return the weights of queries at the state, `(b, n, r, m)`."""
    return (block.queries + _state_scale(block, before)[:, :, None]).exp2_()


def _at_own(block: Block) -> Tensor:
    """Return the products of queries and their own keys, feature by feature: `(b, n, r, m)`."""
    return (block.queries + block.keys[:, :, None]).exp2_()


def _at_end(block: Block, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys `(b, n, m)` and the state `(b, m, 1)` as they stand at the end of the block, and their scale."""
    keys, (log_decay, documents) = block.keys, block.times
    if log_decay is not None:
        keys = keys + LOG2_E * sum_later(log_decay)[..., None]
        before = before + LOG2_E * log_decay.sum(dim=-1)[:, None, None]
    if documents is not None:
        last = documents[:, -1:]
        keys = keys.masked_fill((documents[:, 1:] != last)[..., None], -torch.inf)
        before = before.masked_fill((documents[:, :1] != last)[..., None], EMPTY)
    scale = torch.maximum(before.to(keys.dtype), keys.detach().amax(dim=1, keepdim=True))
    factor = (before - scale).clamp_(max=1.0).exp2_().to(keys.dtype).mT
    if documents is not None:
        factor = factor * (documents[:, :1] == last)[..., None]
    return (keys - scale).exp2_(), factor, scale
