"""A block of causal linear attention: chunks of tokens, each on a scale of its own, all worked on at once.

With log2 features r of a chunk's queries and l of its keys, and `mid`, the chunk's scale, a number per feature,

    a = 2^(r + mid - largest)     P = D * (a b^T)             D: what is left of key j at query i, 0 for j > i
    b = 2^(l - mid)               N = P V + since * (a S)     V = [v, 1], S relative to 2^mid
                                  S' = across * S + b^T (until * V)

N holds numerators and denominators, on a scale per query that their quotient does not feel. The gradients are

    da = (D * (dN V^T)) b + (since * dN) S^T       dr = a * da
    db = (D * (dN V^T))^T a + (until * V) dS'^T    dl = b * db
    dV = P^T dN + until * (b dS')                  dS = a^T (since * dN) + across * dS'

`mid` lies midway between the loudest key in sight, of the chunk or before it, and the weight that each query surely
sees. Where these lie at most `REACH` factors of 2 apart, float32 loses less than 2^-40 of what a query finds, however
loud the keys after it: a <= 2^SHIFT, the best weight in sight is at least 2^(SHIFT - REACH / 2), and what is lost was
below 2^-126 before it was multiplied by at most 2^(REACH / 2). A chunk that reaches further is for `exact.py`.
Features that are no logarithms have no scale (mid = 0) and always fit.

Letters: `x` batch times key heads, `r` queries per key, `t` chunks, `c` tokens of one (`i` queries, `j` keys), `m`
features, `e` value width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from performer_lm.ops.linear.fading import Fading, fade, sum_up_to
from performer_lm.ops.linear.scratch import Scratch
from performer_lm.ops.linear.state import EMPTY, LinearState
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.maps import LOG2_E, Maps

REACH = 120.0
"""How far apart (in factors of 2) the loudest key and the weight that a query surely sees may lie."""
SHIFT = 40.0
"""The exponent of a query's largest feature: above it is room for sums, below it for features far from it."""

PullOwn = Callable[[Tensor], tuple[Tensor, Tensor]]


class Steps(NamedTuple):
    """What sums are multiplied by on their way through a block; None stands for 1."""

    first: Tensor | None  # (x, m): those before the block
    kept: Tensor | None  # (x, t, m or 1): those before a chunk, to be part of those after it
    gained: Tensor | None  # (x, t, m): those of a chunk's own tokens, likewise
    last: Tensor | None  # (x, m), float64: the exponent of the sums after the block


class Chunks(NamedTuple):
    """A block as matrices."""

    queries: Tensor  # (x, t, c r, m): a, weights of the past
    keys: Tensor  # (x, t, c, m): b, weights at the end
    scores: Tensor  # (x, t, c r, c): P, weights of the chunk itself
    states: Tensor  # (x, t, m, e + 1): S before each chunk
    fading: Fading
    steps: Steps
    peak: Tensor | None  # (x, t, c r, 1), float64: the exponent that weights are relative to; None stands for 0
    pull_own: PullOwn | None  # from the gradient at log P to those at r and l; None where P = D * (a b^T)


def open_chunks(maps: Maps, tokens: Tokens, state: LinearState, scratch: Scratch, *, after: Tensor) -> Chunks | None:
    """Compute a block's matrices, and the sums after it; None where a chunk reaches too far.

    Args:
        maps: of queries and keys.
        tokens: a block.
        state: before it, `(x, m, e + 1)` and `(x, m)`.
        scratch: memory to work in, which the matrices stay in.
        after: `(x, m, e + 1)`, where the sums after the block go, relative to `Steps.last`; may be the state's.
    """
    if not tokens.keys.shape[2]:
        return _open_reading(maps, tokens, state, scratch, after=after)
    fading = fade(tokens.log_decay, tokens.documents, scratch.triangle(tokens.keys.shape[2]))
    rows, origin = write_keys(maps, tokens, state, scratch)
    if origin is None:
        queries, peak, left = write_queries(maps, tokens, None, scratch, rows.shape[-1]), None, fading.left
        steps = Steps(None, None if left is None else left.to(rows.dtype), None, None)
    else:
        scale, reach = _find_scale(rows, origin, tokens, state, fading)
        if not _is_within(reach, REACH):
            return None
        shift = (scale - origin).to(rows.dtype)
        rows.sub_(shift[:, :, None]).exp2_()
        queries = write_queries(maps, tokens, shift, scratch, rows.shape[-1])
        largest = queries.amax(dim=-1, keepdim=True).sub_(SHIFT)
        queries.sub_(largest).exp2_()
        peak = largest + origin[..., None]
        steps = find_steps(state.exponent, scale, scale, fading, rows.dtype)
    scores = scratch("scores", *queries.shape[:3], rows.shape[2])
    multiply(queries, rows.mT, out=scores)
    scale_rows(scores, fading.between)
    states = carry(rows, at_end(tokens.values, fading), state.sums, steps, scratch, after=after)
    return Chunks(queries, rows, scores, states, fading, steps, peak, None)


def _open_reading(maps: Maps, tokens: Tokens, state: LinearState, scratch: Scratch, *, after: Tensor) -> Chunks:
    """Compute the matrices of queries that come without keys: all they see is the state, which stays."""
    rows = tokens.keys.new_empty(*tokens.keys.shape[:3], state.sums.shape[1])
    exponent, peak = state.exponent - state.exponent.amax(dim=-1, keepdim=True), None
    shift = exponent[:, None].to(rows.dtype) if maps.query.logarithmic else None
    queries = write_queries(maps, tokens, shift, scratch, rows.shape[-1])
    if shift is not None:
        peak = queries.amax(dim=-1, keepdim=True)
        queries.sub_(peak).exp2_()
    after.copy_(state.sums)
    scores, fading = queries.new_empty(*queries.shape[:3], 0), Fading(queries.new_ones(1, 1, 0), None, None, None, None)
    return Chunks(queries, rows, scores, after[:, None], fading, Steps(None, None, None, None), peak, None)


def read_chunks(chunks: Chunks, values: Tensor, scratch: Scratch) -> Tensor:
    """Return what the queries see, N `(x, t, c r, e + 1)`, given V `(x, t, c, e + 1)`."""
    seen = scratch("seen", *chunks.queries.shape[:3], values.shape[-1])
    multiply(chunks.queries, chunks.states, out=seen)
    if chunks.fading.since_start is not None:
        scale_rows(seen, chunks.fading.since_start)
    return multiply(chunks.scores, values, out=seen, add=True)


def pull_chunks(
    chunks: Chunks, values: Tensor, grad: Tensor, grad_after: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pull gradients back through a block, using its matrices up.

    Args:
        chunks: of `open_chunks` or `open_exact`.
        values: V `(x, t, c, e + 1)`.
        grad: `(x, t, c r, e + 1)`, at N.
        grad_after: `(x, m, e + 1)`, at the sums after the block, relative to `Steps.last`.
        scratch: memory to work in.

    Returns:
        The gradients at the queries' and the keys' features (at natural logarithms, where they are logarithms), at v
        `(x, t, c, e)` and at the sums before the block.
    """
    queries, rows, scores, states, fading, steps, peak, pull_own = chunks
    late = grad if fading.since_start is None else scale_rows(scratch.take("late", grad), fading.since_start)
    grad_gained, grad_before = _carry_back(queries, late, grad_after, steps, scratch)
    grad_scores = multiply(grad, values.mT, out=scratch("grad scores", *scores.shape))
    grad_queries = multiply(late, states.mT, out=scratch("grad queries", *queries.shape))
    grad_keys = multiply(at_end(values, fading), grad_gained.mT, out=scratch("grad keys", *rows.shape))
    e = values.shape[-1] - 1
    grad_values = multiply(rows, grad_gained[..., :e], out=scratch("grad values", *values.shape[:3], e))
    if fading.until_end is not None:
        grad_values.mul_(fading.until_end)
    multiply(scores.mT, grad[..., :e], out=grad_values, add=True)
    if pull_own is None:
        scale_rows(grad_scores, fading.between)
        multiply(grad_scores, rows, out=grad_queries, add=True)
        multiply(grad_scores.mT, queries, out=grad_keys, add=True)
    if peak is not None:
        grad_queries, grad_keys = queries.mul_(grad_queries), rows.mul_(grad_keys)
    if pull_own is not None:
        for whole, own in zip((grad_queries, grad_keys), pull_own(grad_scores.mul_(scores)), strict=True):
            whole.add_(own)
    return grad_queries, grad_keys, grad_values, grad_before


# --- features and their scale -----------------------------------------------------------------------------------------


def write_keys(maps: Maps, tokens: Tokens, state: LinearState, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
    """Map keys to features `(x, t, c, m)`: log2 relative to `origin` `(x, t, 1)`, or values, which have no origin.

    Masked keys are -inf, or zeros. The origin is near the keys' gains, as float32 is finest near zero.
    """
    rows = scratch("keys", *tokens.keys.shape[:3], state.sums.shape[1])
    flat, out = maps.flat(tokens.keys), maps.flat(rows)
    if not maps.key.logarithmic:
        maps.key.write(flat, out, add=False)
        return (rows if tokens.mask is None else rows.masked_fill_(~tokens.mask[..., None], 0.0)), None
    gain = maps.key.gain(flat)
    gain = None if gain is None else gain.view(rows.shape[:3])
    if tokens.log_gain is not None:
        gain = tokens.log_gain if gain is None else gain + tokens.log_gain
    if gain is None:
        maps.key.write(flat, out, add=False)
        origin = state.exponent.new_zeros(*rows.shape[:2], 1)
    else:
        gain = LOG2_E * gain.to(state.exponent.dtype)
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
    rows: Tensor, origin: Tensor, tokens: Tokens, state: LinearState, fading: Fading
) -> tuple[Tensor, Tensor]:
    """Return each chunk's scale `(x, t, m)`, and how far chunks reach at most, from keys `(x, t, c, m)`."""
    ending = high = rows.amax(dim=2) + origin
    if tokens.mask is None:
        low = rows.amin(dim=2) + origin
    else:
        low = rows.masked_fill(~tokens.mask[..., None], torch.inf).amin(dim=2) + origin
        low.masked_fill_(high == -torch.inf, -torch.inf)
    if tokens.documents is not None:
        gone = tokens.documents[..., 1:] != tokens.documents[..., -1:]
        ending = rows.masked_fill(gone[..., None], -torch.inf).amax(dim=2) + origin
    past = loudest_before(state, ending, fading)
    sure = least = past
    if fading.total is not None:  # the loudest key of a chunk may have faded all through it
        least = past + fading.total.amin(dim=1, keepdim=True)
        sure = least + fading.total
    sure = torch.maximum(sure if fading.ended is None else sure.masked_fill(fading.ended, EMPTY), low)
    if tokens.mask is not None:  # masked tokens at the start see the past alone
        lone = ~tokens.mask[..., :1] & (least > EMPTY / 2)
        sure = torch.where(lone, torch.minimum(sure, least), sure)
    top = torch.maximum(past, high)
    return (top + sure).mul_(0.5).round_(), (top - sure).amax()


def loudest_before(state: LinearState, ending: Tensor, fading: Fading) -> Tensor:
    """Bound the exponent of the sums before each chunk from above: `(x, t, m)`.

    Args:
        state: before the first.
        ending: `(x, t, m)`, of the loudest key of each that is there at its end, as if it did not fade in its own.
        fading: of the chunks.
    """
    first = (state.exponent + state.sums[..., -1].log2()).clamp_(min=EMPTY)[:, None]
    if ending.shape[1] == 1:
        return first
    others = ending[:, :-1].clamp(min=EMPTY)
    if fading.total is None:
        return _running_max(torch.cat([first, others], dim=1), fading.ended)
    upto = sum_up_to(fading.total.mT).mT
    found = torch.cat([first, others - upto[:, :-1]], dim=1)
    return _running_max(found, fading.ended) + (upto - fading.total)


def _running_max(x: Tensor, ended: Tensor | None) -> Tensor:
    """Return the maxima of `(x, t, m)` over the chunks up to each, since a document last `ended` before it."""
    step, closed = 1, None if ended is None else pad(ended[:, :-1], (0, 0, 1, 0))
    while step < x.shape[1]:
        more = torch.maximum(x[:, step:], x[:, :-step])
        if closed is not None:
            more = torch.where(closed[:, step:], x[:, step:], more)
            closed = torch.cat([closed[:, :step], closed[:, step:] | closed[:, :-step]], dim=1)
        x, step = torch.cat([x[:, :step], more], dim=1), 2 * step
    return x


def _is_within(reach: Tensor, limit: float) -> bool:
    """Return True if `reach` is at most `limit`. This look is all that the engine asks of values, once a block."""
    return reach.is_meta or bool(reach <= limit)


# --- sums over chunks -------------------------------------------------------------------------------------------------


def find_steps(exponent: Tensor, before: Tensor, own: Tensor, fading: Fading, dtype: torch.dtype) -> Steps:
    """Return what sums are multiplied by to be on the exponents that they shall have.

    Args:
        exponent: `(x, m)`, that the sums before the block have.
        before: `(x, t, m)`, that the sums before each chunk shall have; those after the block keep the last chunk's.
        own: `(x, t, m)`, that the sums of each chunk's own tokens have.
        fading: of the chunks.
        dtype: of the sums.
    """
    after = torch.cat([before[:, 1:], before[:, -1:]], dim=1)
    kept = before - after if fading.total is None else before - after + fading.total
    first, kept, gained = (
        x.clamp_(max=126.0).exp2_().to(dtype) for x in (exponent - before[:, 0], kept, own - after)
    )
    return Steps(first, kept if fading.ended is None else kept.masked_fill_(fading.ended, 0.0), gained, after[:, -1])


def carry(rows: Tensor, values: Tensor, sums: Tensor, steps: Steps, scratch: Scratch, *, after: Tensor) -> Tensor:
    """Return the sums before each chunk `(x, t, m, e + 1)`, and write those after the last."""
    gained = multiply(rows.mT, values, out=scratch("gained", *rows.shape[:2], *sums.shape[1:]))
    if steps.gained is not None:
        gained.mul_(steps.gained[..., None])
    states = scratch("states", *gained.shape)
    _weigh(sums, steps.first, out=states[:, 0])
    for chunk, out in enumerate([*states.unbind(1)[1:], after]):
        if steps.kept is None:
            torch.add(gained[:, chunk], states[:, chunk], out=out)
        else:
            torch.addcmul(gained[:, chunk], states[:, chunk], steps.kept[:, chunk, :, None], out=out)
    return states


def _carry_back(
    queries: Tensor, late: Tensor, grad_after: Tensor, steps: Steps, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Return the gradients at each chunk's own sums `(x, t, m, e + 1)` and at those before the block."""
    lost = scratch("gained", *queries.shape[:2], *grad_after.shape[1:])
    multiply(queries.mT, late, out=lost)
    found, following = scratch("grad gained", *lost.shape), grad_after
    for chunk in reversed(range(lost.shape[1])):
        _weigh(following, None if steps.gained is None else steps.gained[:, chunk], out=found[:, chunk])
        own = lost[:, chunk]
        following = own.add_(following) if steps.kept is None else own.addcmul_(following, steps.kept[:, chunk, :, None])
    return found, _weigh(following, steps.first, out=torch.empty_like(grad_after))


def _weigh(sums: Tensor, factor: Tensor | None, *, out: Tensor) -> Tensor:
    """Multiply sums `(x, m, e + 1)` by a factor `(x, m)`."""
    return out.copy_(sums) if factor is None else torch.mul(sums, factor[..., None], out=out)


def at_end(values: Tensor, fading: Fading) -> Tensor:
    """Return what is left of the values at the end of their chunks, until * V."""
    return values if fading.until_end is None else values * fading.until_end


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
