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

from performer_lm.ops.linear.fading import Fading, fade, sum_up_to
from performer_lm.ops.linear.scratch import Scratch
from performer_lm.ops.linear.state import EMPTY, LinearState
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.maps import LOG2_E, BlockMap, Maps, precise

REACH = 120.0
"""How far apart (in factors of 2) the loudest key and the weight that a query surely sees may lie."""
SHIFT = 40.0
"""The exponent of a query's largest feature: above it is room for sums, below it for features far from it."""

PullOwn = Callable[[Tensor], tuple[Tensor, Tensor]]


class Steps(NamedTuple):
    """What sums are multiplied by on their way through a block; None stands for 1."""

    first: Tensor | None  # (x, m): those before the block
    kept: Tensor | None  # (x, t, m or 1): those before a chunk, to be those after it
    gained: Tensor | None  # (x, t, m): those of a chunk alone, likewise
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


def open_chunks(
    maps: Maps, tokens: Tokens, state: LinearState, scratch: Scratch, *, after: Tensor
) -> Chunks | None:
    """Compute a block's matrices, and the sums after it; None where a chunk reaches too far.

    Args:
        maps: of queries and keys.
        tokens: a block.
        state: before it, `(x, m, e + 1)` and `(x, m)`.
        scratch: memory to work in, which the matrices stay in.
        after: `(x, m, e + 1)`, where the sums after the block go, relative to `Steps.last`.
    """
    if not tokens.keys.shape[2]:
        return _open_reading(maps, tokens, state, scratch, after=after)
    fading = fade(tokens.log_decay, tokens.documents, scratch.triangle(tokens.keys.shape[2]))
    rows, origin = write_keys(maps, tokens, state, scratch)
    if origin is None:
        queries, peak = write_queries(maps, tokens, None, rows, scratch), None
        total, ended = fading.total, fading.ended
        kept = None if total is None and ended is None else rows.new_ones(*rows.shape[:2], 1)
        kept = kept if kept is None or total is None else kept * total.exp2().to(rows.dtype)
        kept = kept if kept is None or ended is None else kept.masked_fill(ended, 0.0)
        steps = Steps(None, kept, None, None)
    else:
        mid, reach = _find_scale(rows, origin, tokens, fading, state.exponent)
        if not is_within(reach, REACH):
            return None
        shift = (mid - origin).to(rows.dtype)
        rows.sub_(shift[:, :, None]).exp2_()
        queries = write_queries(maps, tokens, shift, rows, scratch)
        largest = queries.amax(dim=-1, keepdim=True) - SHIFT
        queries.sub_(largest).exp2_()
        peak = largest + origin[..., None]
        after_each = torch.cat([mid[:, 1:], mid[:, -1:]], dim=1)
        steps = find_steps(state.exponent, mid, mid, after_each, fading, rows.dtype)
    scores = scratch("scores", *queries.shape[:3], rows.shape[2])
    torch.bmm(queries.flatten(0, 1), rows.flatten(0, 1).mT, out=scores.flatten(0, 1))
    scale_rows(scores, fading.between)
    states = carry(rows, at_end(tokens.values, fading), state.sums, steps, scratch, after=after)
    return Chunks(queries, rows, scores, states, fading, steps, peak, None)


def _open_reading(maps: Maps, tokens: Tokens, state: LinearState, scratch: Scratch, *, after: Tensor) -> Chunks:
    """Compute the matrices of queries that come without keys: all they see is the state."""
    exponent = state.exponent - state.exponent.amax(dim=-1, keepdim=True)
    rows, peak = state.sums.new_empty(*tokens.keys.shape[:3], state.sums.shape[1]), None
    shift = exponent[:, None].to(rows.dtype) if maps.query.logarithmic else None
    queries = write_queries(maps, tokens, shift, rows, scratch)
    if shift is not None:
        peak = queries.amax(dim=-1, keepdim=True)
        queries.sub_(peak).exp2_()
    after.copy_(state.sums)
    scores, states = queries.new_empty(*queries.shape[:3], 0), after[:, None]
    still = Steps(None, None, None, None)
    fading = Fading(queries.new_ones(1, 1, 0), None, None, None, None)
    return Chunks(queries, rows, scores, states, fading, still, peak, None)


def read_chunks(chunks: Chunks, values: Tensor, scratch: Scratch) -> Tensor:
    """Return what the queries see, N `(x, t, c r, e + 1)`, given V `(x, t, c, e + 1)`."""
    seen = scratch("seen", *chunks.queries.shape[:3], values.shape[-1])
    torch.bmm(chunks.queries.flatten(0, 1), chunks.states.flatten(0, 1), out=seen.flatten(0, 1))
    if chunks.fading.since_start is not None:
        scale_rows(seen, chunks.fading.since_start)
    seen.flatten(0, 1).baddbmm_(chunks.scores.flatten(0, 1), values.flatten(0, 1))
    return seen


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
    grad_gained, grad_before = carry_back(queries, late, grad_after, steps, scratch)
    grad_scores = scratch("grad scores", *scores.shape)
    torch.bmm(grad.flatten(0, 1), values.flatten(0, 1).mT, out=grad_scores.flatten(0, 1))
    grad_queries, grad_keys = scratch("grad queries", *queries.shape), scratch("grad keys", *rows.shape)
    torch.bmm(late.flatten(0, 1), states.flatten(0, 1).mT, out=grad_queries.flatten(0, 1))
    torch.bmm(at_end(values, fading).flatten(0, 1), grad_gained.flatten(0, 1).mT, out=grad_keys.flatten(0, 1))
    e = values.shape[-1] - 1
    grad_values = scratch("grad values", *values.shape[:3], e)
    torch.bmm(rows.flatten(0, 1), grad_gained[..., :e].flatten(0, 1), out=grad_values.flatten(0, 1))
    if fading.until_end is not None:
        grad_values.mul_(fading.until_end)
    grad_values.flatten(0, 1).baddbmm_(scores.flatten(0, 1).mT, grad[..., :e].flatten(0, 1))
    if pull_own is None:
        scale_rows(grad_scores, fading.between)
        grad_queries.flatten(0, 1).baddbmm_(grad_scores.flatten(0, 1), rows.flatten(0, 1))
        grad_keys.flatten(0, 1).baddbmm_(grad_scores.flatten(0, 1).mT, queries.flatten(0, 1))
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


def write_queries(maps: Maps, tokens: Tokens, shift: Tensor | None, rows: Tensor, scratch: Scratch) -> Tensor:
    """Map queries to features `(x, t, c r, m)`, with `shift` `(x, t, m)` added to all of a chunk's."""
    queries = scratch("queries", *tokens.queries.shape[:3], rows.shape[-1])
    if shift is not None:
        queries.copy_(shift[:, :, None].expand_as(queries))
    maps.query.write(maps.flat(tokens.queries), maps.flat(queries), add=shift is not None)
    return queries


def _find_scale(
    rows: Tensor, origin: Tensor, tokens: Tokens, fading: Fading, exponent: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each chunk's scale `(x, t, m)`, and how far chunks reach at most, from keys `(x, t, c, m)`."""
    high = rows.amax(dim=2) + origin
    low = rows if tokens.mask is None else rows.masked_fill(~tokens.mask[..., None], torch.inf)
    low = (low.amin(dim=2) + origin).masked_fill_(high == -torch.inf, -torch.inf)
    ending = high
    if tokens.documents is not None:
        gone = tokens.documents[..., 1:] != tokens.documents[..., -1:]
        ending = rows.masked_fill(gone[..., None], -torch.inf).amax(dim=2) + origin
    loudest, least = loudest_before(exponent, ending, fading)
    sure = least if fading.total is None else least + fading.total
    sure = torch.maximum(sure if fading.ended is None else sure.masked_fill(fading.ended, EMPTY), low)
    if tokens.mask is not None:  # masked tokens at the start see the past alone
        lone = ~tokens.mask[..., :1] & (least > EMPTY / 2)
        sure = torch.where(lone, torch.minimum(sure, least), sure)
    top = torch.maximum(loudest, high)
    return (0.5 * (top + sure)).round_(), (top - sure).amax()


def loudest_before(exponent: Tensor, ending: Tensor, fading: Fading) -> tuple[Tensor, Tensor]:
    """Bound the exponent of the sums before each chunk, from above and from below: `(x, t, m)` each.

    Args:
        exponent: `(x, m)`, before the first.
        ending: `(x, t, m)`, of the loudest key of each that is there at its end, before it has faded.
        fading: of the chunks.
    """
    ending = ending.clamp(min=EMPTY)
    if fading.total is None:
        found = _running_max(exponent, ending, fading.ended)
        return found, found
    upto = sum_up_to(fading.total.mT).mT
    before = upto - fading.total
    loudest, least = (_running_max(exponent, ending - part, fading.ended) + before for part in (upto, before))
    return loudest, least


def _running_max(first: Tensor, others: Tensor, ended: Tensor | None) -> Tensor:
    """Return the maxima of `(x, m)` and the chunks' `(x, t, m)` before each chunk, since a document last `ended`."""
    found, step = torch.cat([first[:, None], others[:, :-1]], dim=1), 1
    closed = None if ended is None else torch.nn.functional.pad(ended[:, :-1], (0, 0, 1, 0))
    while step < found.shape[1]:
        more = torch.maximum(found[:, step:], found[:, :-step])
        if closed is not None:
            more = torch.where(closed[:, step:], found[:, step:], more)
            closed = torch.cat([closed[:, :step], closed[:, step:] | closed[:, :-step]], dim=1)
        found, step = torch.cat([found[:, :step], more], dim=1), 2 * step
    return found


def is_within(reach: Tensor, limit: float) -> bool:
    """Return True if `reach` is at most `limit`. This look is all that the engine asks of values, once a block."""
    return reach.is_meta or bool(reach <= limit)


# --- sums over chunks -------------------------------------------------------------------------------------------------


def find_steps(
    exponent: Tensor, before: Tensor, own: Tensor, after: Tensor, fading: Fading, dtype: torch.dtype
) -> Steps:
    """Return what sums are multiplied by, from exponents: `(x, m)` before the block, `(x, t, m)` of each chunk.

    Args:
        exponent: of the sums before the block.
        before: that the sums before each chunk shall have.
        own: that each chunk's own sums have.
        after: that the sums after each chunk shall have.
        fading: of the chunks.
        dtype: of the sums.
    """
    kept = before - after if fading.total is None else before - after + fading.total
    first, kept, gained = (
        x.clamp(max=126.0).exp2_().to(dtype) for x in (exponent - before[:, 0], kept, own - after)
    )
    return Steps(first, kept if fading.ended is None else kept.masked_fill_(fading.ended, 0.0), gained, after[:, -1])


def carry(
    rows: Tensor, values: Tensor, sums: Tensor, steps: Steps, scratch: Scratch, *, after: Tensor
) -> Tensor:
    """Return the sums before each chunk `(x, t, m, e + 1)`, and write those after the last; `after` may be `sums`."""
    gained = scratch("gained", *rows.shape[:2], *sums.shape[1:])
    torch.bmm(rows.flatten(0, 1).mT, values.flatten(0, 1), out=gained.flatten(0, 1))
    if steps.gained is not None:
        gained.mul_(steps.gained[..., None])
    states = scratch("states", *gained.shape)
    _multiply(sums, steps.first, out=states[:, 0])
    each = zip(gained.unbind(1), states.unbind(1), [*states.unbind(1)[1:], after], strict=True)
    for chunk, (own, before, out) in enumerate(each):
        if steps.kept is None:
            torch.add(own, before, out=out)
        else:
            torch.addcmul(own, before, steps.kept[:, chunk, :, None], out=out)
    return states


def carry_back(
    queries: Tensor, late: Tensor, grad_after: Tensor, steps: Steps, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Return the gradients at each chunk's own sums `(x, t, m, e + 1)` and at those before the block `(x, m, e + 1)`."""
    lost = scratch("gained", *queries.shape[:2], *grad_after.shape[1:])
    torch.bmm(queries.flatten(0, 1).mT, late.flatten(0, 1), out=lost.flatten(0, 1))
    found, following = scratch("grad gained", *lost.shape), grad_after
    for chunk in reversed(range(lost.shape[1])):
        _multiply(following, None if steps.gained is None else steps.gained[:, chunk], out=found[:, chunk])
        own = lost[:, chunk]
        if steps.kept is None:
            own.add_(following)
        else:
            own.addcmul_(following, steps.kept[:, chunk, :, None])
        following = own
    return found, _multiply(following, steps.first, out=torch.empty_like(grad_after))


def _multiply(sums: Tensor, factor: Tensor | None, *, out: Tensor) -> Tensor:
    """Multiply sums `(x, m, e + 1)` by a factor `(x, m)`."""
    return out.copy_(sums) if factor is None else torch.mul(sums, factor[..., None], out=out)


def at_end(values: Tensor, fading: Fading) -> Tensor:
    """Return what is left of the values at the end of their chunks, until * V."""
    return values if fading.until_end is None else values * fading.until_end


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply `(x, t, c r, ...)` in place by a factor `(x, t, c, 1, ...)`."""
    c = factor.shape[-3]
    x.unflatten(2, (c, x.shape[2] // c)).mul_(factor)
    return x
