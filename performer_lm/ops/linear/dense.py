"""One block of causal linear attention on one scale: all matrix products, forward and backward written out.

Every feature of the block's keys is put relative to one scale, the largest it has reached by the block's end. That is
exact to rounding as long as no weight in sight lies more than `HEADROOM` below it, which `fits_one_scale` tells; other
blocks go to `halves.py`. Features that are not logarithms have no scale and always fit.

A block is worked on in tiles of c tokens: within a tile tokens see each other through a c x c matrix, across tiles
through the sums S, which one tile after the other joins. With features E of queries and F of keys, D what is left of a
key (`Fading`) and V = [v, 1], a tile's weighted sums N = [numerator, denominator] and the gradients are

    P = D * (E F^T)          N = P V + since * (E S)          S' = across * S + F^T (until * V)
    dE = (D * (dN V^T)) F + (since * dN) S^T                  dF = (D * (dN V^T))^T E + (until * V) dS'^T
    dv = P^T dn + until * (F dS'_n)                           dS = E^T (since * dN) + across * dS'

where n stands for the columns of numerators. The odd width e + 1 costs a seventh of the rate of products that write it;
numerators and denominators apart would cost more, in passes over features. Tiles are the first dimension of what is
written: batched products are fast into contiguous memory only; and S, used tile by tile, stays in the cache.

Letters: `b` batch times key heads, `r` queries per key, `t` tiles, `c` tokens of a tile (`i` queries, `j` keys), `m`
features, `e` value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.linear.fading import Fading, Times
from performer_lm.ops.linear.scratch import Scratch
from performer_lm.ops.linear.state import EMPTY
from performer_lm.ops.maps import LOG2_E

HEADROOM = 72.0
"""How far below its block's scale (in factors of 2) a weight in sight may lie: float32 ends at 126, 24 are digits."""


class Tiles(NamedTuple):
    """A block as its tiles, features on one scale."""

    queries: Tensor  # (b, t, c r, m): E
    keys: Tensor  # (b, t, c, m): F
    values: Tensor  # (b, t, c, e + 1): V
    fading: Fading

    @property
    def at_end(self) -> Tensor:
        """Return what is left of the values at the end of their tiles, until * V."""
        until = self.fading.until_end
        return self.values if until is None else self.values * until


class Gradients(NamedTuple):
    """Gradients of a block: at features in `dense.py`, at their logarithms elsewhere."""

    queries: Tensor  # (b, t, c r, m) or (b, n r, m)
    keys: Tensor  # (b, t, c, m) or (b, n, m)
    values: Tensor  # (b, n, e)
    sums: Tensor  # (b, m, e + 1), before the block


def fits_one_scale(keys: Tensor, before: Tensor, scale: Tensor, times: Times) -> bool:
    """Tell whether every query surely sees, in each feature, a weight within HEADROOM of the scale.

    Either the state is such a weight until the end, or each token's own key is, or the last key before a masked one.
    This looks at values, so it is for the host only.

    Args:
        keys: `(b, n, m)` log features, -inf where masked.
        before: `(b, 1, m)`, the state's scale.
        scale: `(b, 1, m)`, the block's.
        times: how keys fade.
    """
    rise = scale - before
    if times.log_decay is not None:
        rise = rise - LOG2_E * times.log_decay.sum(dim=-1)[:, None, None]
    if times.documents is None and bool(rise.amax() <= HEADROOM):
        return True
    own = scale - keys.masked_fill(keys == -torch.inf, torch.inf).amin(dim=1, keepdim=True)
    lone = (keys[:, :1] == -torch.inf) & (before > EMPTY / 2)  # masked tokens first: they see the state alone
    own = torch.where(lone, torch.maximum(own, scale - before), own)
    return bool(((own if times.documents is not None else torch.minimum(own, rise)) <= HEADROOM).all())


def attend_dense(tiles: Tiles, sums: Tensor, scratch: Scratch) -> Tensor:
    """Return what the queries see, numerators and denominators `(t, b, c r, e + 1)`.

    `sums` `(b, m, e + 1)` are those before the block; those after it take their place.
    """
    queries, keys, values, fade = tiles
    scores = _scores(queries, keys, fade, scratch, "scores")
    seen = scratch("seen", *_tiles_first(queries)[:-1], values.shape[-1])
    each = zip(*(x.unbind(1) for x in (queries, keys, values, tiles.at_end, scores)), seen, strict=True)
    for tile, (query, key, value, at_end, score, out) in enumerate(each):
        torch.bmm(query, sums, out=out)
        if fade.since_start is not None:
            _times(out, fade.since_start[:, tile])
        out.baddbmm_(score, value)
        _absorb(sums, key, at_end, fade, tile)
    return seen


def pull_dense(tiles: Tiles, sums: Tensor, grad: Tensor, grad_sums: Tensor, scratch: Scratch) -> Gradients:
    """Pull back gradients at what queries see and at the sums after the block.

    Args:
        tiles: a block.
        sums: `(b, m, e + 1)`, before the block; used up.
        grad: `(b, t, c r, e + 1)`, at numerators and denominators.
        grad_sums: `(b, m, e + 1)`, at the sums after the block; those at the sums before it take their place.
        scratch: memory to work in.
    """
    fade = tiles.fading
    late = grad if fade.since_start is None else _times(scratch.take("late", grad), fade.since_start)
    scores = _scores(tiles.queries, tiles.keys, fade, scratch, "scores")
    grad_scores = _scores(grad, tiles.values, fade, scratch, "grad scores")
    grad_queries = _sweep_onward(tiles, sums, late, grad_scores, scratch("grad queries", *_tiles_first(tiles.queries)))
    grad_keys = scratch("grad keys", *_tiles_first(tiles.keys))
    grad_values = scratch("grad values", *_tiles_first(tiles.values)[:-1], tiles.values.shape[-1] - 1)
    _sweep_back(tiles, grad_sums, late, grad, scores, grad_scores, grad_keys, grad_values)
    grad_queries, grad_keys, grad_values = (x.transpose(0, 1) for x in (grad_queries, grad_keys, grad_values))
    return Gradients(grad_queries, grad_keys, grad_values.flatten(1, 2), grad_sums)


def _sweep_onward(tiles: Tiles, sums: Tensor, late: Tensor, grad_scores: Tensor, grad_queries: Tensor) -> Tensor:
    """Write the queries' gradients, `(t, b, c r, m)`, while sums grow from tile to tile."""
    each = zip(*(x.unbind(1) for x in (tiles.keys, tiles.at_end, late, grad_scores)), grad_queries, strict=True)
    for tile, (key, value, row, grad_score, out) in enumerate(each):
        torch.bmm(row, sums.mT, out=out).baddbmm_(grad_score, key)
        _absorb(sums, key, value, tiles.fading, tile)
    return grad_queries


def _sweep_back(
    tiles: Tiles,
    grad_sums: Tensor,
    late: Tensor,
    grad: Tensor,
    scores: Tensor,
    grad_scores: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
) -> None:
    """Write the gradients of keys and values, `(t, b, c, ...)`, while that at the sums grows from the last tile on."""
    fade, e = tiles.fading, grad_values.shape[-1]
    inputs = (tiles.queries, tiles.keys, tiles.at_end, late, grad, scores, grad_scores)
    each = tuple(zip(*(x.unbind(1) for x in inputs), grad_keys, grad_values, strict=True))
    for tile in reversed(range(len(each))):
        query, key, value, row, rest, score, grad_score, out_key, out_value = each[tile]
        torch.bmm(value, grad_sums.mT, out=out_key).baddbmm_(grad_score.mT, query)
        torch.bmm(key, grad_sums[..., :e], out=out_value)
        if fade.until_end is not None:
            out_value.mul_(fade.until_end[:, tile])
        out_value.baddbmm_(score.mT, rest[..., :e])
        _absorb(grad_sums, query, row, fade, tile)


def _tiles_first(x: Tensor) -> tuple[int, ...]:
    """Return the shape of `(b, t, ...)` with the tiles first."""
    return x.shape[1], x.shape[0], *x.shape[2:]


def _scores(rows: Tensor, columns: Tensor, fade: Fading, scratch: Scratch, name: str) -> Tensor:
    """Return the faded products of rows `(b, t, c r, ...)` and columns `(b, t, c, ...)`: `(b, t, c r, c)`."""
    scores = scratch(name, *rows.shape[:3], columns.shape[2])
    torch.bmm(rows.flatten(0, 1), columns.flatten(0, 1).mT, out=scores.flatten(0, 1))
    return _times(scores, fade.between)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply `(..., c r, x)` in place by a factor `(..., c, 1, x)`."""
    x.unflatten(-2, (factor.shape[-3], -1)).mul_(factor)
    return x


def _absorb(sums: Tensor, features: Tensor, values: Tensor, fade: Fading, tile: int) -> None:
    """Let sums fade over a tile, and take in the products of features `(b, c, m)` and values `(b, c, e + 1)`."""
    if fade.across is not None:
        sums.mul_(fade.across[:, tile])
    sums.baddbmm_(features.mT, values)
