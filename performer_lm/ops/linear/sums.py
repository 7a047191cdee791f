"""The sums over a block's tiles: what its queries see, what its keys leave, and the gradients of both.

With the matrices a, b, P of `chunks.py`, dN the gradient at what queries see and dS' that at the sums after a tile,

    N = P V + since * (a S)                    S' = across * S + b^T (until * V)
    da = (D * (dN V^T)) b + (since * dN) S^T   db = (D * (dN V^T))^T a + (until * V) dS'^T
    dV = P^T dN + until * (b dS')              dS = a^T (since * dN) + across * dS'

Tiles on one scale join the sums one after the other, in place, where a cache holds them. Tiles on scales of their own
are for devices that want few and large operations: one product for all of them, then a pass that adds up.

Letters: as in `chunks.py`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.linear.chunks import Chunks, Steps, multiply, scale_rows
from performer_lm.ops.linear.fading import Fading
from performer_lm.ops.linear.state import Scratch


class Pulled(NamedTuple):
    """The gradients of a block."""

    queries: Tensor  # (x, t, c r, m), at features; at their natural logarithms, where they are logarithms
    keys: Tensor  # (x, t, c, m), as for queries
    values: Tensor  # (x, t, c, e)
    sums: Tensor  # (x, m, e + 1), before the block


def attend_tiles(
    chunks: Chunks, values: Tensor, sums: Tensor, scratch: Scratch, *, in_place: bool, after: Tensor
) -> Tensor:
    """Return the numerators and denominators of queries, N `(x, t, c r, e + 1)`, and write the sums after the block.

    Args:
        chunks: the block's matrices.
        values: V `(x, t, c, e + 1)`.
        sums: `(x, m, e + 1)`, before the block.
        scratch: memory to work in.
        in_place: whether tiles are on one scale and join one after the other.
        after: `(x, m, e + 1)`, for the sums after the block; may be `sums`.
    """
    queries, rows, scores, fading, steps, _, _ = chunks
    at_end = _at_end(values, fading)
    if not in_place:
        states = _carry(rows, at_end, sums, steps, scratch, after=after)
        seen = multiply(queries, states, out=scratch("seen", *queries.shape[:3], values.shape[-1]))
        seen = seen if fading.since_start is None else scale_rows(seen, fading.since_start)
        return multiply(scores, values, out=seen, add=True)
    _weigh(sums, steps.first, out=after)
    seen = scratch("seen", *_tiles_first(queries)[:-1], values.shape[-1])
    for tile, (out, own_queries, own_keys, own_scores, own_values, left) in enumerate(
        _by_tile(seen.transpose(0, 1), queries, rows.mT, scores, values, at_end)
    ):
        torch.bmm(own_queries, after, out=out)
        if fading.since_start is not None:
            scale_rows(out[:, None], fading.since_start[:, tile, None])
        out.baddbmm_(own_scores, own_values)
        _join(after, own_keys, left, steps, tile)
    return seen.transpose(0, 1)


def pull_tiles(
    chunks: Chunks,
    values: Tensor,
    grad: Tensor,
    sums: Tensor,
    grad_after: Tensor,
    scratch: Scratch,
    *,
    in_place: bool,
) -> Pulled:
    """Pull gradients back through a block, using its matrices up.

    Args:
        chunks: the block's matrices.
        values: V `(x, t, c, e + 1)`.
        grad: dN `(x, t, c r, e + 1)`.
        sums: `(x, m, e + 1)`, before the block.
        grad_after: dS' `(x, m, e + 1)`, at the sums after the block, relative to `Steps.last`; used up.
        scratch: memory to work in.
        in_place: as in the forward.
    """
    queries, rows, scores, fading, steps, peak, pull_own = chunks
    late = grad if fading.since_start is None else scale_rows(grad.clone(), fading.since_start)
    grad_scores = multiply(grad, values.mT, out=scratch("grad scores", *scores.shape))
    given = _Given(queries, rows, scores, _at_end(values, fading), late, grad, grad_scores, fading, steps)
    if pull_own is None:
        scale_rows(grad_scores, fading.between)
    pull = _pull_in_place if in_place else _pull_at_once
    found = pull(given, sums, grad_after, scratch, own=pull_own is None)
    if peak is not None:
        found = found._replace(queries=queries.mul_(found.queries), keys=rows.mul_(found.keys))
    if pull_own is not None:
        for whole, own in zip(found[:2], pull_own(grad_scores.mul_(scores)), strict=True):
            whole.add_(own)
    return found


class _Given(NamedTuple):
    """The arguments of both ways to pull gradients back."""

    queries: Tensor
    keys: Tensor
    scores: Tensor
    at_end: Tensor  # (x, t, c, e + 1): until * V
    late: Tensor  # (x, t, c r, e + 1): since * dN
    grad: Tensor
    grad_scores: Tensor  # (x, t, c r, c): D * (dN V^T)
    fading: Fading
    steps: Steps


# --- one tile after the other -----------------------------------------------------------------------------------------


def _pull_in_place(given: _Given, sums: Tensor, grad_after: Tensor, scratch: Scratch, *, own: bool) -> Pulled:
    """Sweep over the tiles onward, while the sums grow, and back, while their gradient does."""
    queries, rows, scores, at_end, late, grad, grad_scores, fading, steps = given
    e = at_end.shape[-1] - 1
    grad_queries, grad_keys = (scratch(name, *_tiles_first(x)) for name, x in (("dq", queries), ("dk", rows)))
    grad_values = scratch("dv", *_tiles_first(at_end)[:-1], e)
    state = _weigh(sums, steps.first, out=scratch("sums", *sums.shape))
    for tile, (out, own_late, own_grad, keys, left) in enumerate(
        _by_tile(grad_queries.transpose(0, 1), late, grad_scores, rows, at_end)
    ):
        torch.bmm(own_late, state.mT, out=out)
        if own:
            out.baddbmm_(own_grad, keys)
        _join(state, keys.mT, left, steps, tile)
    grads = (x.transpose(0, 1) for x in (grad_keys, grad_values))
    parts = (at_end, grad_scores.mT, queries, rows, scores.mT, grad[..., :e], late)
    for tile, (out, out_values, left, own_grad, own_queries, keys, own_scores, seen, own_late) in reversed(
        [*enumerate(_by_tile(*grads, *parts))]
    ):
        if steps.gained is not None:
            grad_after.mul_(steps.gained[:, tile, :, None])
        torch.bmm(left, grad_after.mT, out=out)
        if own:
            out.baddbmm_(own_grad, own_queries)
        torch.bmm(keys, grad_after[..., :e], out=out_values)
        if fading.until_end is not None:
            out_values.mul_(fading.until_end[:, tile])
        out_values.baddbmm_(own_scores, seen)
        if steps.kept is not None and steps.gained is None:
            grad_after.mul_(steps.kept[:, tile, :, None])
        grad_after.baddbmm_(own_queries.mT, own_late)
    queries, rows, values = (x.transpose(0, 1) for x in (grad_queries, grad_keys, grad_values))
    return Pulled(queries, rows, values, _weigh(grad_after, steps.first, out=grad_after))


def _by_tile(*blocks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return the tiles of tensors `(x, t, ...)`, cut at once: to index every tile of each takes a tenth of a step."""
    return zip(*(block.unbind(1) for block in blocks), strict=True)


def _join(sums: Tensor, rows: Tensor, values: Tensor, steps: Steps, tile: int) -> None:
    """Let sums fade over a tile and take in its keys `(x, m, c)` and values `(x, c, e + 1)`, in place."""
    if steps.kept is not None and steps.gained is None:
        sums.mul_(steps.kept[:, tile, :, None])
    sums.baddbmm_(rows, values)
    if steps.gained is not None:  # what is kept fades with what is gained
        sums.mul_(steps.gained[:, tile, :, None])


def _tiles_first(x: Tensor) -> tuple[int, ...]:
    """Return the shape of `(x, t, ...)` with the tiles first: products are fast into contiguous memory only."""
    return x.shape[1], x.shape[0], *x.shape[2:]


# --- all tiles at once ------------------------------------------------------------------------------------------------


def _pull_at_once(given: _Given, sums: Tensor, grad_after: Tensor, scratch: Scratch, *, own: bool) -> Pulled:
    """Compute the sums before each tile and the gradients at them, then all products."""
    queries, rows, scores, at_end, late, grad, grad_scores, fading, steps = given
    after, e = scratch("sums", *sums.shape), at_end.shape[-1] - 1
    states = _carry(rows, at_end, sums, steps, scratch, after=after)
    grad_queries = multiply(late, states.mT, out=scratch("dq", *queries.shape))
    lost = multiply(queries.mT, late, out=scratch("gained", *states.shape))
    following = grad_after
    for tile in reversed(range(lost.shape[1])):
        out = lost[:, tile]
        following = out.add_(following) if steps.kept is None else out.addcmul_(following, steps.kept[:, tile, :, None])
    gained = states  # where the sums are not needed any more
    gained[:, :-1].copy_(lost[:, 1:])
    gained[:, -1].copy_(grad_after)
    gained = gained if steps.gained is None else gained.mul_(steps.gained[..., None])
    grad_keys = multiply(at_end, gained.mT, out=scratch("dk", *rows.shape))
    grad_values = multiply(rows, gained[..., :e], out=scratch("dv", *at_end.shape[:3], e))
    grad_values = grad_values if fading.until_end is None else grad_values.mul_(fading.until_end)
    multiply(scores.mT, grad[..., :e], out=grad_values, add=True)
    if own:
        multiply(grad_scores, rows, out=grad_queries, add=True)
        multiply(grad_scores.mT, queries, out=grad_keys, add=True)
    return Pulled(grad_queries, grad_keys, grad_values, _weigh(following, steps.first, out=grad_after))


def _carry(rows: Tensor, values: Tensor, sums: Tensor, steps: Steps, scratch: Scratch, *, after: Tensor) -> Tensor:
    """Return the sums before each tile `(x, t, m, e + 1)`, and write those after the last."""
    gained = multiply(rows.mT, values, out=scratch("gained", *rows.shape[:2], *sums.shape[1:]))
    if steps.gained is not None:
        gained.mul_(steps.gained[..., None])
    states = scratch("states", *gained.shape)
    _weigh(sums, steps.first, out=states[:, 0])
    for tile, out in enumerate([*states.unbind(1)[1:], after]):
        if steps.kept is None:
            torch.add(gained[:, tile], states[:, tile], out=out)
        else:
            torch.addcmul(gained[:, tile], states[:, tile], steps.kept[:, tile, :, None], out=out)
    return states


def _weigh(sums: Tensor, factor: Tensor | None, *, out: Tensor) -> Tensor:
    """Multiply sums `(x, m, e + 1)` by a factor `(x, m)`."""
    return out.copy_(sums) if factor is None else torch.mul(sums, factor[..., None], out=out)


def _at_end(values: Tensor, fading: Fading) -> Tensor:
    """Return until * V, the values as they are left at the end of their tiles."""
    return values if fading.until_end is None else values * fading.until_end
