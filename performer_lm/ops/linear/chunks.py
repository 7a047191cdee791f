"""A block of causal linear attention as matrices: tiles of tokens on a scale, which all find each other's weights on.

With log2 features r of a tile's queries and l of its keys, and `mid`, the scale, a number per feature,

    a = 2^(r + mid - largest)     P = D * (a b^T)             D: what is left of key j at query i, 0 for j > i
    b = 2^(l - mid)               N = P V + since * (a S)     V = [v, 1], S relative to 2^mid
                                  S' = across * S + b^T (until * V)

N holds numerators and denominators, on a scale per query that their quotient does not feel. `sums.py` has the products.

`mid` lies midway between the loudest key in sight, of the tile or before it, and the weight that each query surely
sees. Where these lie at most `REACH` factors of 2 apart, float32 loses less than 2^-40 of what a query finds, however
loud the keys after it: a <= 2^SHIFT, the best weight in sight is at least 2^(SHIFT - REACH / 2), and what is lost was
below 2^-126 before it was multiplied by at most 2^(REACH / 2). A block that reaches further is for `exact.py`.
Features that are no logarithms have no scale (mid = 0) and always fit.

Letters: `x` batch times key heads, `r` queries per key, `t` tiles, `c` tokens of one (`i` queries, `j` keys), `s`
scales (one per tile, or one for all), `m` features, `e` value width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from performer_lm.ops.linear.fading import Fading, fade, sum_up_to
from performer_lm.ops.linear.state import EMPTY, LinearState, Scratch
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.maps import Maps
from performer_lm.ops.precision import LOG2_E

REACH = 120.0
"""How far apart (in factors of 2) the loudest key and the weight that a query surely sees may lie."""
SHIFT = 40.0
"""The exponent of a query's largest feature: above it is room for sums, below it for features far from it."""

PullOwn = Callable[[Tensor], tuple[Tensor, Tensor]]


class Steps(NamedTuple):
    """The factors on sums on their way through a block; None stands for 1."""

    first: Tensor | None  # (x, m): those before the block
    kept: Tensor | None  # (x, t, m or 1): those before a tile, to be part of those after it
    gained: Tensor | None  # (x, t, m or 1): those of a tile's own tokens, to be part of those after it
    last: Tensor | None  # (x, m), float64: the exponent of the sums after the block


class Chunks(NamedTuple):
    """A block as matrices."""

    queries: Tensor  # (x, t, c r, m): a, weights of the past
    keys: Tensor  # (x, t, c, m): b, weights at the end
    scores: Tensor  # (x, t, c r, c): P, weights of the tile itself
    fading: Fading
    steps: Steps
    peak: Tensor | None  # (x, t, c r, 1), float64: the exponent that weights are relative to; None stands for 0
    pull_own: PullOwn | None  # from the gradient at log P to those at r and l; None where P = D * (a b^T)


def open_chunks(maps: Maps, tokens: Tokens, state: LinearState, scratch: Scratch, *, one_scale: bool) -> Chunks | None:
    """Compute a block's matrices, in `scratch`; None where it reaches too far.

    Args:
        maps: of queries and keys.
        tokens: a block.
        state: before it, `(x, m, e + 1)` and `(x, m)`.
        scratch: memory to work in.
        one_scale: whether all tiles share a scale.
    """
    if not tokens.keys.shape[2]:
        return _open_reading(maps, tokens, state, scratch)
    c = tokens.keys.shape[2]
    fading = fade(tokens.log_decay, tokens.documents, scratch, c, gains=maps.key.logarithmic)
    rows, origin = write_keys(maps, tokens, state, scratch, gain=fading.gain)
    if origin is None:
        queries, peak = write_queries(maps, tokens, None, scratch, rows.shape[-1]), None
        steps = Steps(None, fading.left(rows.dtype), None, None)
    else:
        scale, reach = _find_scale(rows, origin, tokens, state, fading, scratch, one_scale=one_scale)
        if not (reach.is_meta or bool(reach <= REACH)):  # all that the engine asks of values, once a block
            return None
        shift = (scale - origin).to(rows.dtype)
        rows.sub_(shift[:, :, None]).exp2_()
        queries = write_queries(maps, tokens, shift, scratch, rows.shape[-1])
        largest = queries.amax(dim=-1, keepdim=True).sub_(SHIFT)
        queries.sub_(largest).exp2_()
        peak = largest + origin[..., None]
        if fading.gain is not None:
            peak = (peak.unflatten(2, (c, queries.shape[2] // c)) - fading.gain[..., None, None]).flatten(2, 3)
        steps = _find_steps(state.exponent, scale, fading, rows.dtype)
    scores = multiply(queries, rows.mT, out=scratch("scores", *queries.shape[:3], c))
    return Chunks(queries, rows, scale_rows(scores, fading.between), fading, steps, peak, None)


def _open_reading(maps: Maps, tokens: Tokens, state: LinearState, scratch: Scratch) -> Chunks:
    """Compute the matrices of queries that come without keys: all they see is the state, which stays."""
    rows = tokens.keys.new_empty(*tokens.keys.shape[:3], state.sums.shape[1])
    exponent, peak = state.exponent - state.exponent.amax(dim=-1, keepdim=True), None
    shift = exponent[:, None].to(rows.dtype) if maps.query.logarithmic else None
    queries = write_queries(maps, tokens, shift, scratch, rows.shape[-1])
    if shift is not None:
        peak = queries.amax(dim=-1, keepdim=True)
        queries.sub_(peak).exp2_()
    fading = Fading(queries.new_ones(1, 1, 0), None, None, None, None, None)
    scores = queries.new_empty(*queries.shape[:3], 0)
    return Chunks(queries, rows, scores, fading, Steps(None, None, None, None), peak, None)


# --- features and their scale -----------------------------------------------------------------------------------------


def write_keys(
    maps: Maps, tokens: Tokens, state: LinearState, scratch: Scratch, *, gain: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Map keys to features `(x, t, c, m)`: log2 relative to `origin` `(x, t, 1)`, or values, which have no origin.

    Logarithms have `gain` `(x, t, c)` added. Masked keys are -inf, or zeros. The origin is near the keys' gains, as
    float32 is finest near zero.
    """
    rows = scratch("keys", *tokens.keys.shape[:3], state.sums.shape[1])
    flat, out = maps.flat(tokens.keys), maps.flat(rows)
    if not maps.key.logarithmic:
        maps.key.write(flat, out, add=False)
        return (rows if tokens.mask is None else rows.masked_fill_(~tokens.mask[..., None], 0.0)), None
    for more in (maps.key.gain(flat), tokens.log_gain):
        if more is not None:
            more = LOG2_E * more.to(state.exponent.dtype).view(rows.shape[:3])
            gain = more if gain is None else gain + more
    if gain is None:
        maps.key.write(flat, out, add=False)
        origin = state.exponent.new_zeros(*rows.shape[:2], 1)
    else:
        origin = gain.amax(dim=-1, keepdim=True).round_()
        rows.copy_((gain - origin)[..., None].expand_as(rows))
        maps.key.write(flat, out, add=True)
    return (rows if tokens.mask is None else rows.masked_fill_(~tokens.mask[..., None], -torch.inf)), origin


def write_queries(maps: Maps, tokens: Tokens, shift: Tensor | None, scratch: Scratch, m: int) -> Tensor:
    """Map queries to features `(x, t, c r, m)`, with `shift` `(x, t, m)` added to all of a chunk's."""
    queries = scratch("queries", *tokens.queries.shape[:3], m)
    if shift is not None:
        queries.copy_(shift[:, :, None].expand_as(queries))
    maps.query.write(maps.flat(tokens.queries), maps.flat(queries), add=shift is not None)
    return queries


def _find_scale(
    rows: Tensor,
    origin: Tensor,
    tokens: Tokens,
    state: LinearState,
    fading: Fading,
    scratch: Scratch,
    *,
    one_scale: bool,
) -> tuple[Tensor, Tensor]:
    """Return the scale `(x, s, m)`, and how far the block reaches at most, from its keys `(x, t, c, m)`."""
    high = rows.amax(dim=2) + origin
    if tokens.mask is None:
        low = rows.amin(dim=2) + origin
    else:
        low = rows.masked_fill(~tokens.mask[..., None], torch.inf).amin(dim=2) + origin
    ending, total, ended = high, fading.total, fading.ended
    if one_scale:
        high, low = high.amax(dim=1, keepdim=True), low.amin(dim=1, keepdim=True)
        total = None if total is None else total.sum(dim=1, keepdim=True)
        ended = None if ended is None else ended.any(dim=1, keepdim=True)
        past = least = loudest(state)
    else:
        if tokens.documents is not None:
            gone = tokens.documents[..., 1:] != tokens.documents[..., -1:]
            ending = rows.masked_fill(gone[..., None], -torch.inf).amax(dim=2) + origin
        if total is not None and fading.is_mild:
            ending = ending + total
        past = least = loudest_before(state, ending, fading, scratch)
        if total is not None and not fading.is_mild:  # the loudest key of a tile may have faded all through it
            least = past + total.amin(dim=1, keepdim=True)
    sure = least if total is None else least + total
    if tokens.mask is not None:
        low.masked_fill_(high == -torch.inf, EMPTY)  # no key at all
    sure = torch.maximum(sure if ended is None else sure.masked_fill(ended, EMPTY), low)
    if tokens.mask is not None:
        lone = ~tokens.mask[:, : sure.shape[1], :1] & (least > EMPTY / 2)  # tokens that see the past alone
        sure = torch.where(lone, torch.minimum(sure, least), sure)
    top = torch.maximum(past, high)
    return (top + sure).mul_(0.5).round_(), (top - sure).amax()


def loudest(state: LinearState) -> Tensor:
    """Return the exponent of a state's denominators, `(x, 1, m)`."""
    return (state.exponent + state.sums[..., -1].log2()).clamp_(min=EMPTY)[:, None]


def loudest_before(state: LinearState, ending: Tensor, fading: Fading, scratch: Scratch) -> Tensor:
    """Bound the exponent of the sums before each tile from above: `(x, t, m)`.

    Args:
        state: before the first.
        ending: `(x, t, m)`, of the loudest key of each that is there at its end, or more.
        fading: of the tiles.
        scratch: holds triangles.
    """
    others = ending[:, :-1].clamp(min=EMPTY)
    if fading.total is None:
        return _running_max(torch.cat([loudest(state), others], dim=1), fading.ended)
    upto = sum_up_to(fading.total.mT, scratch).mT
    found = torch.cat([loudest(state), others - upto[:, :-1]], dim=1)
    return _running_max(found, fading.ended) + (upto - fading.total)


def _running_max(x: Tensor, ended: Tensor | None) -> Tensor:
    """Return the maxima of `(x, t, m)` over the tiles up to each, since a document last `ended` before it."""
    if ended is None:
        return x.cummax(dim=1).values
    step, closed = 1, pad(ended[:, :-1], (0, 0, 1, 0))
    while step < x.shape[1]:
        more = torch.where(closed[:, step:], x[:, step:], torch.maximum(x[:, step:], x[:, :-step]))
        closed = torch.cat([closed[:, :step], closed[:, step:] | closed[:, :-step]], dim=1)
        x, step = torch.cat([x[:, :step], more], dim=1), 2 * step
    return x


def _find_steps(exponent: Tensor, scale: Tensor, fading: Fading, dtype: torch.dtype) -> Steps:
    """Return the factors on sums, given the exponent that they have `(x, m)` and the scales `(x, s, m)`."""
    left, gained = fading.left(dtype), None
    if scale.shape[1] > 1:
        gained = _factor(scale, torch.cat([scale[:, 1:], scale[:, -1:]], dim=1), dtype)
    kept = gained if left is None else left if gained is None else left * gained
    first = _factor(exponent, scale[:, 0], dtype)
    return Steps(first, kept, kept if fading.is_mild else gained, scale[:, -1])


def steps_between(exponent: Tensor, before: Tensor, own: Tensor, after: Tensor, fading: Fading, like: Tensor) -> Steps:
    """Return the factors that put sums on the exponents that they shall have, in the dtype of `like`.

    Args:
        exponent: `(x, m)`, that the sums before the block have.
        before: `(x, t, m)`, that the sums before each tile shall have.
        own: `(x, t, m)`, that the sums of each tile's own tokens have.
        after: `(x, t, m)`, that the sums after each tile shall have.
        fading: of the tiles.
        like: the sums, or features.
    """
    kept = _factor(before if fading.total is None else before + fading.total, after, like.dtype)
    kept = kept if fading.ended is None else kept.masked_fill_(fading.ended, 0.0)
    return Steps(_factor(exponent, before[:, 0], like.dtype), kept, _factor(own, after, like.dtype), after[:, -1])


def _factor(exponent: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factor from one exponent to another. Where it would overflow, sums are zero or too loud."""
    return (exponent - other).clamp_(max=126.0).exp2_().to(dtype)


# --- products ---------------------------------------------------------------------------------------------------------


def multiply(one: Tensor, other: Tensor, *, out: Tensor, add: bool = False) -> Tensor:
    """Write the matrix product of `(x, t, i, k)` and `(x, t, k, j)` to `out`, or add it to that."""
    flat = out.flatten(0, 1)
    if add:
        flat.baddbmm_(one.flatten(0, 1), other.flatten(0, 1))
    else:
        torch.bmm(one.flatten(0, 1), other.flatten(0, 1), out=flat)
    return out


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply `(x, t, c r, ...)` in place by a factor `(x, t, c, 1, ...)`."""
    c = factor.shape[-3]
    x.unflatten(2, (c, x.shape[2] // c)).mul_(factor)
    return x
