"""A sequence of the delta rule: a loop over blocks, and a backward that computes features and inverses anew.

Forward keeps q, k, v, beta, the output and the memory before each block. For the backward, with X the errors, Y = beta
X what is written, dO and dS' the gradients at the output and at the memory after a tile (letters as in `blocks.py`),

    dY = P^T dO + D_c (K dS')         dX = beta dY          R = T^T dX
    dQ = (dP D) K + E (dO S^T)        dP = dO Y^T           dV = R
    dK = (dP D)^T Q + (D_c Y) dS'^T - (E R) S^T + (C + C^T) K       C = D beta_j dB      dB = -R X^T, j < i
    dbeta = X . (dY - overlaps^T R)   dS = E_c dS' + (E Q)^T dO - (T E K)^T dX

Decay has no pass of its own: to scale all that is written from token t on, and to let nothing of before decay into it,
changes nothing, so that d log_decay_t = sum over i >= t of (out_i . dO_i - v_i . dV_i) + the sum of S' dS'.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `x` = g b.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.delta.blocks import Block, Writes, open_block, pull_unit
from performer_lm.ops.linear.chunks import multiply, scale_rows
from performer_lm.ops.linear.fading import sum_up_to
from performer_lm.ops.linear.state import Geometry, Scratch
from performer_lm.ops.linear.tokens import by_key_heads, cut
from performer_lm.ops.maps import BlockMap, Maps


def attend(
    maps: Maps, geometry: Geometry, tokens: Writes, memory: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Write and read a sequence from a memory `(x, m, e)`.

    Returns:
        The output `(b, h, n, e)`, the memory before each block `(blocks, x, m, e)` (of none where they are not to be
        kept), and that after the last.
    """
    (b, h, n, _), e = tokens.queries.shape, tokens.values.shape[-1]
    scratch = Scratch(memory.dtype, memory.device)
    blocks, memory = list(cut(n, geometry.block, geometry.tile)), memory.clone()
    out, kept = memory.new_empty(b, h, n, e), memory.new_empty(len(blocks) if keep else 0, *memory.shape)
    room = by_key_heads(out, tokens.keys.shape[1])
    for index, part in enumerate(blocks):
        if keep:
            kept[index] = memory
        taken = take_block(tokens, part, geometry.tile, memory.dtype)
        block = open_block(maps, taken, memory.shape[1], scratch)
        course = _carry(block, taken.beta, memory, scratch)
        seen = multiply(block.queries, course.before, out=scratch("seen", *block.queries.shape[:3], e))
        seen = seen if block.fading.since_start is None else scale_rows(seen, block.fading.since_start)
        multiply(block.scores, course.written, out=seen, add=True)
        room[:, :, part].copy_(seen.view(room[:, :, part].shape))
    return out, kept, memory


class Course(NamedTuple):
    """How a memory runs through a block's tiles."""

    after: Tensor  # (x, m, e): after the block
    before: Tensor  # (x, t, m, e): before each tile
    written: Tensor  # (x, t, c, e): Y
    late: Tensor  # (x, t, c, e): what is left of Y at its tile's end


def _carry(block: Block, beta: Tensor, memory: Tensor, scratch: Scratch) -> Course:
    """Carry a memory `(x, m, e)`, which is overwritten, through a block; the errors replace `block.own`."""
    errors, keys, left = block.own, block.keys, block.fading.left(memory.dtype)
    before = scratch("memories", keys.shape[0], keys.shape[1], *memory.shape[1:])
    written = late = scratch("written", *errors.shape)
    if block.fading.until_end is not None:
        late = scratch("late", *errors.shape)
    for tile in range(keys.shape[1]):
        before[:, tile] = memory
        error = errors[:, tile].baddbmm_(block.reach[:, tile], memory, alpha=-1.0)
        torch.mul(error, beta[:, tile, :, None], out=written[:, tile])
        if block.fading.until_end is not None:
            torch.mul(written[:, tile], block.fading.until_end[:, tile], out=late[:, tile])
        if left is not None:
            memory.mul_(left[:, tile, :, None])
        memory.baddbmm_(keys[:, tile].mT, late[:, tile])
    return Course(memory, before, written, late)


def pull(
    maps: Maps,
    geometry: Geometry,
    tokens: Writes,
    trace: tuple[Tensor, Tensor, Tensor],
    grad: Tensor | None,
    grad_memory: Tensor | None,
    *,
    wanted: bool,
) -> tuple[Writes, Tensor, list[Tensor | None]]:
    """Walk the blocks from the end.

    Args:
        maps: as in the forward, like geometry and tokens.
        geometry: of blocks.
        tokens: of the caller.
        trace: what the forward returned, its memories kept.
        grad: `(b, h, n, e)`, at the output, if there is any.
        grad_memory: `(x, m, e)`, at the memory after the last token, if there is any.
        wanted: whether the maps' tensors want gradients.

    Returns:
        The gradients at tokens, the memory and the maps' tensors.
    """
    out, kept, after = trace
    g, dtype = tokens.keys.shape[1], after.dtype
    scratch = Scratch(dtype, after.device)
    q, k, v, beta = (torch.empty_like(x) for x in tokens[:4])
    found = Writes(q, k, v, beta, None if tokens.log_decay is None else torch.empty_like(tokens.log_decay), None, None)
    totals = [torch.zeros_like(x) if wanted else None for x in maps.tensors]
    grad = torch.zeros_like(out) if grad is None else grad
    grad_memory = torch.zeros_like(after) if grad_memory is None else grad_memory.clone()
    places, seen, at_seen = _by_key_heads(found, g), by_key_heads(out, g), by_key_heads(grad.to(dtype), g)
    for index, part in reversed(list(enumerate(cut(out.shape[2], geometry.block, geometry.tile)))):
        taken = take_block(tokens, part, geometry.tile, dtype)
        pulled, grad_memory = _pull_block(
            maps, taken, kept[index], seen[:, :, part], at_seen[:, :, part], grad_memory, totals, scratch
        )
        for place, piece in zip(places, pulled, strict=True):
            if place is not None and piece is not None:
                place[:, :, part].copy_(piece.reshape(place[:, :, part].shape))
    return found, grad_memory, totals


def _pull_block(
    maps: Maps,
    tokens: Writes,
    memory: Tensor,
    out: Tensor,
    grad: Tensor,
    grad_memory: Tensor,
    totals: list[Tensor | None],
    scratch: Scratch,
) -> tuple[Writes, Tensor]:
    """Pull gradients back through a block: those at its tokens, and at the memory before it."""
    block = open_block(maps, tokens, memory.shape[1], scratch)
    after, memories, written, late = _carry(block, tokens.beta, memory.clone(), scratch)
    queries, keys, errors, fading, beta = block.queries, block.keys, block.own, block.fading, tokens.beta[..., None]
    grad, left = grad.reshape(*queries.shape[:3], out.shape[-1]), fading.left(memory.dtype)
    early_grad = grad
    if fading.since_start is not None:
        early_grad = scale_rows(scratch.take("early grad", grad), fading.since_start)

    grad_written = multiply(block.scores.mT, grad, out=scratch("grad written", *written.shape))
    grad_errors = scratch("grad errors", *written.shape)
    grad_memories = multiply(queries.mT, early_grad, out=scratch("grad memories", *memories.shape))
    ends = scratch("grad ends", *memories.shape)  # at the memory after each tile
    for tile in reversed(range(keys.shape[1])):
        ends[:, tile] = grad_memory
        at_end = torch.bmm(keys[:, tile], grad_memory)
        grad_written[:, tile].add_(at_end if fading.until_end is None else at_end.mul_(fading.until_end[:, tile]))
        error = torch.mul(grad_written[:, tile], beta[:, tile], out=grad_errors[:, tile])
        if left is not None:
            grad_memory.mul_(left[:, tile, :, None])
        grad_memory.add_(grad_memories[:, tile]).baddbmm_(block.reach[:, tile].mT, error, alpha=-1.0)

    solved = multiply(block.inverse.mT, grad_errors, out=scratch("solved", *written.shape))  # R
    mixed = multiply(solved, errors.mT, out=scratch("mixed", *block.overlaps.shape)).tril_(-1).neg_()  # dB
    scale_rows(mixed.mul_(tokens.beta[..., None, :]), fading.between)  # C
    weights = multiply(grad, written.mT, out=scratch("weights", *block.scores.shape))  # dP D
    scale_rows(weights, fading.between)

    grad_queries = multiply(weights, keys, out=scratch("grad queries", *queries.shape))
    multiply(early_grad, memories.mT, out=grad_queries, add=True)
    grad_keys = multiply(late, ends.mT, out=scratch("grad keys", *keys.shape))
    early = solved if fading.since_start is None else solved * fading.since_start[..., 0]
    grad_keys.flatten(0, 1).baddbmm_(early.flatten(0, 1), memories.mT.flatten(0, 1), alpha=-1.0)
    multiply(mixed.add_(mixed.mT.clone()), keys, out=grad_keys, add=True)
    multiply(weights.mT, queries, out=grad_keys, add=True)
    if tokens.mask is not None:
        grad_keys.masked_fill_(~tokens.mask[..., None], 0.0)
    undone = multiply(block.overlaps.mT, solved, out=scratch("undone", *written.shape))
    grad_beta = (errors * (grad_written - undone)).sum(dim=-1)
    log_decay = None
    if tokens.log_decay is not None:
        x, t, c, _ = written.shape
        own = (out.reshape(x, t, c, -1) * grad.reshape(x, t, c, -1)).sum(dim=-1) - (tokens.values * solved).sum(dim=-1)
        following = torch.cat([memories[:, 1:], after[:, None]], dim=1)
        log_decay = _sum_from(own, scratch) + (following * ends).sum(dim=(2, 3))[..., None]
    count = len(maps.query.tensors)
    pulled = Writes(
        _pull_map(maps, maps.query, tokens.queries, queries, block.sizes[0], grad_queries, totals, 0),
        _pull_map(maps, maps.key, tokens.keys, keys, block.sizes[1], grad_keys, totals, count),
        *(solved, grad_beta, log_decay, None, None),
    )
    return pulled, grad_memory


def _sum_from(x: Tensor, scratch: Scratch) -> Tensor:
    """Return the sums of `(x, t, c)` over i..c."""
    upto = sum_up_to(x, scratch)
    return (upto[..., -1:] - upto + x).to(x.dtype)


def _pull_map(
    maps: Maps,
    a_map: BlockMap,
    x: Tensor,
    features: Tensor,
    inverse: Tensor,
    grad: Tensor,
    totals: list[Tensor | None],
    first: int,
) -> Tensor:
    """Pull the gradient at unit features of x back to x, and add that at the map's tensors to the totals."""
    grad = pull_unit(a_map, features, inverse, grad)
    found, tensors = a_map.pull(maps.flat(x), maps.flat(grad), wanted=any(total is not None for total in totals))
    for total, more in zip(totals[first:], tensors, strict=False):
        if total is not None and more is not None:
            total.add_(more)
    return found.view(x.shape)


def take_block(tokens: Writes, part: slice, tile: int, dtype: torch.dtype) -> Writes:
    """Copy a block out of a sequence, in whole tiles or one part of a tile."""
    cut_out = [None if x is None else x[:, :, part] for x in _by_key_heads(tokens, tokens.keys.shape[1])[:6]]
    queries, keys, values, beta, log_decay, mask = cut_out
    assert queries is not None
    assert keys is not None
    assert values is not None
    assert beta is not None
    g, b, n, r, d = queries.shape
    t = max(1, n // tile)
    shape = (g * b, t, n // t)
    queries, keys = queries.reshape(g * b, t, n // t * r, d).to(dtype), keys.reshape(*shape, d).to(dtype)
    values, beta = values.reshape(*shape, values.shape[-1]).to(dtype), beta.reshape(shape).to(dtype)
    log_decay, mask = (None if x is None else x.reshape(shape) for x in (log_decay, mask))
    if mask is not None:
        absent = ~mask[..., None]
        keys, values, beta = (
            keys.masked_fill(absent, 0.0),
            values.masked_fill(absent, 0.0),
            beta.masked_fill(~mask, 0.0),
        )
    documents = None
    if tokens.documents is not None:
        around = tokens.documents.expand(g, -1, -1)[:, :, part.start : part.stop + 1].reshape(g * b, n + 1)
        documents = around.unfold(1, n // t + 1, n // t)
    return Writes(queries, keys, values, beta, log_decay, mask, documents)


def _by_key_heads(tokens: Writes, g: int) -> list[Tensor | None]:
    """View all of a caller's but documents as `(g, b, n, ...)`, queries as `(g, b, n, r, d)`."""
    queries, *rest, mask, _ = tokens
    turned = [None if x is None else x.transpose(0, 1) for x in rest]
    return [by_key_heads(queries, g), *turned, None if mask is None else mask.expand(g, -1, -1), None]
