"""The way of the memory through a block, tile by tile, and of the gradient at it back.

Tiles join the memory in place, one after the other, where a cache holds it. Where a launch costs more than arithmetic,
all that a tile does to the memory, and to the gradient at it, is one product prepared for all tiles at once:

    S' = A S + (D_c K)^T beta T V             A = E_c I - (D_c K)^T beta T E K
    dS = A^T dS' + F^T [E dO, -E T^T beta P^T dO]

Letters: as in `blocks.py` and `sequence.py`.
"""

from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.delta.blocks import Block, Writes
from performer_lm.ops.linear.chunks import multiply, scale_rows
from performer_lm.ops.linear.state import Scratch

FEW = 16
"""So many tiles follow one another; more go in runs side by side."""


class Course(NamedTuple):
    """The results of a memory's way through a block."""

    seen: Tensor  # (x, t, c r, e): E Q S
    errors: Tensor  # (x, t, c, e): X
    after: Tensor  # (x, m, e): the memory after the block


class Return(NamedTuple):
    """The results of the way back."""

    before: Tensor  # (x, t, m, e): S
    early: Tensor  # (x, t, l, e): E dO with -E R below it
    grad_written: Tensor  # (x, t, c, e): dY
    solved: Tensor  # (x, t, c, e): R
    grad_keys: Tensor  # (x, t, c, m): D_c Y dS'^T
    grad_memory: Tensor  # (x, m, e): dS before the block


def carry_in_place(block: Block, tokens: Writes, memory: Tensor, scratch: Scratch) -> Course:
    """Carry a memory `(x, m, e)`, which is overwritten, through a block."""
    (x, t, c, e), asked = tokens.values.shape, block.queries.shape[2]
    since, left, strength = block.fading.since_start, block.fading.left(memory.dtype), _strength(block, tokens)
    seen, errors = scratch("seen", x, t, asked, e), scratch("errors", x, t, c, e)
    for tile in range(t):
        read = torch.bmm(block.features[:, tile], memory, out=scratch("read", x, asked + c, e))
        seen[:, tile] = read[:, :asked]
        held = read[:, asked:] if since is None else read[:, asked:].mul_(since[:, tile, ..., 0])
        missing = torch.sub(tokens.values[:, tile], held, out=scratch("missing", x, c, e))
        error = torch.bmm(block.inverse[:, tile], missing, out=scratch("error", x, c, e))
        errors[:, tile] = error
        if left is not None:
            memory.mul_(left[:, tile, :, None])
        memory.baddbmm_(block.keys[:, tile].mT, error.mul_(strength[:, tile]))
    return Course(seen if since is None else scale_rows(seen, since), errors, memory)


def carry_at_once(block: Block, tokens: Writes, memory: Tensor, scratch: Scratch) -> Course:
    """Carry a memory `(x, m, e)` through a block by products prepared for all tiles."""
    reach, late_keys, steps = _prepare_steps(block, tokens, scratch)
    errors = multiply(block.inverse, tokens.values, out=scratch("errors", *tokens.values.shape))
    after = multiply(late_keys.mT, errors, out=scratch("memories", *steps.shape[:3], errors.shape[-1]))
    last = scan(steps, after, memory)
    before = torch.cat([memory[:, None], after[:, :-1]], dim=1)
    errors.flatten(0, 1).baddbmm_(reach.flatten(0, 1), before.flatten(0, 1), alpha=-1.0)
    seen = multiply(block.queries, before, out=scratch("seen", *block.queries.shape[:3], errors.shape[-1]))
    since = block.fading.since_start
    return Course(seen if since is None else scale_rows(seen, since), errors, last.clone())


def return_in_place(
    block: Block, tokens: Writes, errors: Tensor, given: Tensor, ends: tuple[Tensor, Tensor], scratch: Scratch
) -> Return:
    """Carry the gradient at the memory back through a block.

    Args:
        block: the matrices.
        tokens: of the block.
        errors: `(x, t, c, e)`, X.
        given: `(x, t, l, e)`, dO with room below it.
        ends: the memory before the block, and the gradient at that after it, `(x, m, e)`, which is overwritten.
        scratch: memory to work in.
    """
    (x, t, c, e), (memory, grad_memory), keys = errors.shape, ends, block.keys
    left, until = block.fading.left(memory.dtype), block.fading.until_end
    late = torch.mul(errors, _strength(block, tokens), out=scratch("late", *errors.shape))
    before = scratch("memories", x, t, *memory.shape[1:])
    before[:, 0] = memory
    for tile in range(t - 1):
        after = before[:, tile + 1]
        torch.mul(before[:, tile], 1.0 if left is None else left[:, tile, :, None], out=after)
        after.baddbmm_(keys[:, tile].mT, late[:, tile])
    early, minus = _start_early(block, given, scratch)
    grad_written = multiply(block.scores.mT, given[:, :, :-c], out=scratch("grad written", *errors.shape))
    solved, grad_keys = scratch("solved", *errors.shape), scratch("grad keys", *keys.shape)
    for tile in reversed(range(t)):
        at_end = torch.bmm(keys[:, tile], grad_memory, out=scratch("at end", x, c, e))
        grad_written[:, tile].add_(at_end if until is None else at_end.mul_(until[:, tile]))
        grad_error = torch.mul(grad_written[:, tile], tokens.beta[:, tile, :, None], out=at_end)
        solved[:, tile] = torch.bmm(block.inverse[:, tile].mT, grad_error, out=scratch("solved in a tile", x, c, e))
        torch.mul(solved[:, tile], minus[:, tile], out=early[:, tile, -c:])
        room = scratch("grad keys in a tile", x, c, keys.shape[-1])
        grad_keys[:, tile] = torch.bmm(late[:, tile], grad_memory.mT, out=room)
        if left is not None:
            grad_memory.mul_(left[:, tile, :, None])
        grad_memory.baddbmm_(block.features[:, tile].mT, early[:, tile])
    return Return(before, early, grad_written, solved, grad_keys, grad_memory)


def return_at_once(
    block: Block, tokens: Writes, errors: Tensor, given: Tensor, ends: tuple[Tensor, Tensor], scratch: Scratch
) -> Return:
    """Carry the gradient at the memory back by products prepared for all tiles; see `return_in_place`."""
    (c, e), (memory, grad_memory), beta = errors.shape[2:], ends, tokens.beta[..., None]
    until, (_, late_keys, steps) = block.fading.until_end, _prepare_steps(block, tokens, scratch)
    own = multiply(block.inverse, tokens.values, out=scratch("solved", *errors.shape))
    after = multiply(late_keys.mT, own, out=scratch("memories", *steps.shape[:3], e))
    scan(steps, after, memory)
    before = torch.cat([memory[:, None], after[:, :-1]], dim=1)

    early, minus = _start_early(block, given, scratch)
    grad_written = multiply(block.scores.mT, given[:, :, :-c], out=scratch("grad written", *errors.shape))
    solved = multiply(block.inverse.mT, beta * grad_written, out=own)
    torch.mul(solved, minus, out=early[:, :, -c:])
    grads = multiply(block.features.mT, early, out=scratch("grad memories", *after.shape)).flip(1)
    last = scan(steps.mT.flip(1), grads, grad_memory)
    following = torch.cat([grad_memory[:, None], grads[:, :-1]], dim=1).flip(1)

    at_end = multiply(block.keys, following, out=scratch("at end", *errors.shape))
    grad_written.add_(at_end if until is None else at_end.mul_(until))
    multiply(block.inverse.mT, beta * grad_written, out=solved)
    torch.mul(solved, minus, out=early[:, :, -c:])
    late = torch.mul(errors, _strength(block, tokens), out=at_end)
    grad_keys = multiply(late, following.mT, out=scratch("grad keys", *block.keys.shape))
    return Return(before, early, grad_written, solved, grad_keys, last)


def scan(steps: Tensor, own: Tensor, first: Tensor) -> Tensor:
    """Turn G into S of S_i = A_i S_(i-1) + G_i in place, and return the last.

    Of many tiles, about sqrt(t) runs go side by side, each from nothing, with the product of its steps; then the ends
    of runs are joined: some 2 sqrt(t) products wait for each other, not t.

    Args:
        steps: `(x, t, m, m)`, A.
        own: `(x, t, m, e)`, G.
        first: `(x, m, e)`, S before the first tile.
    """
    (x, t, _, e), last, joined = own.shape, first, 0
    if t >= FEW:
        length = isqrt(t)
        runs, joined = t // length, t // length * length
        grown = torch.cat([own, steps], dim=-1)[:, :joined].unflatten(1, (runs, length))
        grown = grown.permute(2, 0, 1, 3, 4).flatten(1, 2).contiguous()  # (length, x runs, m, e + m)
        moves = grown[1:, ..., e:].clone()
        grown[1:, ..., e:] = 0.0
        for tile, move in enumerate(moves):
            grown[tile + 1].baddbmm_(move, grown[tile])
        starts = [first]
        for end in grown[-1].unflatten(0, (x, runs)).unbind(1):
            starts.append(torch.baddbmm(end[..., :e], end[..., e:], starts[-1]))
        *starts, last = starts
        found = grown[..., :e] + grown[..., e:] @ torch.stack(starts, dim=1).flatten(0, 1)
        own[:, :joined].unflatten(1, (runs, length)).copy_(found.unflatten(1, (x, runs)).permute(1, 2, 0, 3, 4))
    for tile in range(joined, t):
        last = own[:, tile].baddbmm_(steps[:, tile], last)
    return last


def _prepare_steps(block: Block, tokens: Writes, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Return T E K and D_c beta K `(x, t, c, m)`, and A `(x, t, m, m)`."""
    since, left, keys = block.fading.since_start, block.fading.left(block.keys.dtype), block.keys
    early = block.inverse if since is None else block.inverse * since[..., 0].mT
    reach = multiply(early, keys, out=scratch("reach", *keys.shape))
    late_keys = torch.mul(keys, _strength(block, tokens), out=scratch("late keys", *keys.shape))
    steps = scratch("steps", *keys.shape[:2], keys.shape[-1], keys.shape[-1])
    steps.flatten(0, 1).baddbmm_(late_keys.flatten(0, 1).mT, reach.flatten(0, 1), beta=0.0, alpha=-1.0)
    steps.diagonal(dim1=-2, dim2=-1).add_(1.0 if left is None else left)
    return reach, late_keys, steps


def _strength(block: Block, tokens: Writes) -> Tensor:
    """Return what of a token's error is in the memory at its tile's end, D_c beta, `(x, t, c, 1)`."""
    beta, until = tokens.beta[..., None], block.fading.until_end
    return beta if until is None else beta * until


def _start_early(block: Block, given: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Return E dO with room below it, `(x, t, l, e)`, and -E `(x, t, c, 1)`."""
    since, c = block.fading.since_start, block.keys.shape[2]
    if since is None:
        return given, given.new_full((1, given.shape[1], 1, 1), -1.0)
    early = scratch.take("early", given)
    scale_rows(early[:, :, :-c], since)
    return early, since[..., 0].neg()
