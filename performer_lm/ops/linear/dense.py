"""One block of causal linear attention on one scale: all matrix products, forward and backward written out.

Every feature of the block's keys is put relative to one scale, the largest it has reached by the block's end. That is
exact to rounding as long as no weight in sight lies more than `HEADROOM` below it, which `fits_one_scale` tells; other
blocks go to `halves.py`. Features that are not logarithms have no scale and always fit.

A block is worked on in tiles of c tokens, all at once: within a tile tokens see each other through a c x c matrix,
across tiles through the sums S that each tile finds, on the one scale. With features E of queries and F of keys, D what
is left of a key (`Fading`) and V = [v, 1], the weighted sums N = [numerator, denominator] and the gradients are

    P = D * (E F^T)          N = P V + since * (E S)          S' = across * S + F^T (until * V)
    dE = (D * (dN V^T)) F + (since * dN) S^T                  dF = (D * (dN V^T))^T E + (until * V) dS'^T
    dV = P^T dN + until * (F dS')                             dS = E^T (since * dN) + across * dS'

Letters: `b` batch times key heads, `r` queries per key, `t` tiles, `c` tokens of a tile (`i` queries, `j` keys), `m`
features, `e` value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.linear.fading import Fading, Times, pull_fading

HEADROOM = 50.0
"""How far below its block's scale (in nats) a weight in sight may lie: float32 ends at 87, 16 are for precision."""


class Weighing(NamedTuple):
    """The tiles of a block: features, faded scores, and the sums each tile finds."""

    queries: Tensor  # (b t, r c, m): E
    keys: Tensor  # (b t, c, m): F
    values: Tensor  # (b t, c, e + 1): V
    until: Tensor  # (b t, c, e + 1): until * V
    fade: Fading
    scores: Tensor  # (b t, r c, c): P
    sums: Tensor  # (b t, m, e + 1): S
    last: Tensor  # (b, m, e + 1): S of the last tile


class Gradients(NamedTuple):
    """Gradients of a block, the last where anything decays."""

    queries: Tensor  # (b t, r c, m)
    keys: Tensor  # (b t, c, m)
    values: Tensor  # (b t, c, e + 1)
    sums: Tensor  # (b, m, e + 1), on the block's scale
    log_decay: Tensor | None  # (b t, c)


def fits_one_scale(keys: Tensor, log_scale: Tensor, scale: Tensor, times: Times) -> bool:
    """Tell whether every query surely sees, in each feature, a weight within HEADROOM of the scale.

    Either the state is such a weight until the end, or each token's own key is. This looks at values, so it is for the
    host only.
    """
    rise = scale - log_scale
    if times.log_decay is not None:
        rise = rise - times.log_decay.sum(dim=-1, keepdim=True)
    if times.documents is None and bool((rise <= HEADROOM).all()):
        return True
    below = scale - keys.masked_fill(keys == -torch.inf, torch.inf).amin(dim=1)
    return bool((below <= HEADROOM).all())


def weigh(queries: Tensor, keys: Tensor, values: Tensor, sums: Tensor, fade: Fading) -> Weighing:
    """Score queries `(b t, r c, m)` against keys `(b t, c, m)`, and sum up keys and values until the last tile.

    `sums` `(b, m, e + 1)` are those before the block.
    """
    scores = _fade_scores(torch.bmm(queries, keys.mT), fade.between)
    until = values if fade.until_end is None else values * fade.until_end[..., None]
    if keys.shape[0] == sums.shape[0]:
        return Weighing(queries, keys, values, until, fade, scores, sums, sums)
    tiles = keys.shape[0] // sums.shape[0]
    early_keys, early_values = (_split_tiles(x, tiles)[:, :-1] for x in (keys, until))
    found = early_keys.mT @ early_values
    each = [sums]
    for a in range(tiles - 1):
        each.append(_carry(each[-1], found[:, a], fade, a))
    return Weighing(queries, keys, values, until, fade, scores, torch.stack(each, dim=1).flatten(0, 1), each[-1])


def absorb_dense(block: Weighing) -> Tensor:
    """Return the sums after the block, `(b, m, e + 1)`; uses up those before its last tile."""
    tiles = block.keys.shape[0] // block.last.shape[0]
    keys, values = (_split_tiles(x, tiles)[:, -1] for x in (block.keys, block.until))
    if block.fade.across is not None:
        block.last.mul_(block.fade.across.unflatten(0, (-1, tiles))[:, -1, None, None])
    return block.last.baddbmm_(keys.mT, values)


def attend_dense(block: Weighing) -> Tensor:
    """Return what the queries see, numerators and denominators `(b t, r c, e + 1)`."""
    seen = torch.bmm(block.queries, block.sums)
    if block.fade.since_start is not None:
        seen.mul_(_rows(block.fade.since_start, seen))
    return seen.baddbmm_(block.scores, block.values)


def pull_dense(block: Weighing, grad: Tensor, grad_next: Tensor, *, decays: bool) -> Gradients:
    """Pull back gradients at what queries see `(b t, r c, e + 1)` and at the next sums `(b, m, e + 1)`."""
    fade, c = block.fade, block.values.shape[1]
    late = grad if fade.since_start is None else grad * _rows(fade.since_start, grad)
    grad_after, grad_sums = _pull_sums(torch.bmm(block.queries.mT, late), grad_next, fade)
    grad_values = torch.bmm(block.keys, grad_after)
    grad_raw = torch.bmm(grad, block.values.mT)
    grad_fade = None
    if decays and fade.across is not None:
        seen = torch.bmm(block.queries, block.sums).mul_(late).sum(dim=-1)
        grad_fade = pull_fading(
            between=_sum_queries(grad_raw * block.scores, c),
            since_start=_sum_queries(seen, c),
            until_end=(block.until * grad_values).sum(dim=-1),
            across=(grad_after * block.sums).sum(dim=(1, 2)) * fade.across,
        )
    _fade_scores(grad_raw, fade.between)
    if fade.until_end is not None:
        grad_values.mul_(fade.until_end[..., None])
    return Gradients(
        queries=torch.bmm(grad_raw, block.keys).baddbmm_(late, block.sums.mT),
        keys=torch.bmm(grad_raw.mT, block.queries).baddbmm_(block.until, grad_after.mT),
        values=grad_values.baddbmm_(block.scores.mT, grad),
        sums=grad_sums,
        log_decay=grad_fade,
    )


def _pull_sums(found: Tensor, grad_next: Tensor, fade: Fading) -> tuple[Tensor, Tensor]:
    """Return the gradients at the sums after each tile, `(b t, m, e + 1)`, and before the first, `(b, m, e + 1)`."""
    if found.shape[0] == grad_next.shape[0]:
        kept = grad_next if fade.across is None else grad_next * fade.across[:, None, None]
        return grad_next, found.add_(kept)
    found = found.unflatten(0, (grad_next.shape[0], -1))
    each = torch.empty_like(found)
    for a in reversed(range(found.shape[1])):
        each[:, a] = grad_next
        grad_next = _carry(grad_next, found[:, a], fade, a)
    return each.flatten(0, 1), grad_next


def _split_tiles(x: Tensor, tiles: int) -> Tensor:
    return x.unflatten(0, (-1, tiles))


def _carry(kept: Tensor, found: Tensor, fade: Fading, tile: int) -> Tensor:
    """Return across * kept + found of one tile."""
    if fade.across is None:
        return kept + found
    return torch.addcmul(found, kept, fade.across.unflatten(0, (kept.shape[0], -1))[:, tile, None, None])


def _fade_scores(scores: Tensor, between: Tensor) -> Tensor:
    """Multiply scores `(b t, r i, j)` in place by what is left of the keys."""
    scores.unflatten(1, (-1, scores.shape[-1])).mul_(between[:, None])
    return scores


def _sum_queries(x: Tensor, c: int) -> Tensor:
    """Sum over the queries of each key: `(b t, r c, ...)` -> `(b t, c, ...)`."""
    return x if x.shape[1] == c else x.unflatten(1, (-1, c)).sum(dim=1)


def _rows(factor: Tensor, like: Tensor) -> Tensor:
    """Repeat a factor per token `(b t, c)` over the queries of one key: `(b t, r c, 1)`."""
    return factor.repeat(1, like.shape[1] // factor.shape[1])[..., None]
