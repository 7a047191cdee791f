"""A sequence of the delta rule: a loop over blocks, and a backward that computes features and inverses anew.

Forward keeps q, k, v, beta, the output, the errors X and the memory before each block. For the backward, with Y = beta
X what is written, dO and dS' the gradients at the output and at the memory after a tile (letters as in `blocks.py`),

    dY = P^T dO + D_c (K dS')         dX = beta dY          R = T^T dX = dV
    N = [dO, -R], below each other    W = D (N Y^T)         dbeta = X . (dY - overlaps^T R)
    dF = W K + E N S^T, and to its keys W^T F + (D_c Y) dS'^T
    dS = E_c dS' + (E F)^T N

Decay has no pass of its own: to scale all that is written from token t on, and to let nothing of before decay into it,
changes nothing, so that d log_decay_t = sum over i >= t of (out_i . dO_i - v_i . dV_i) + the sum of S' dS' at the end.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `x` = g b.
"""

import torch
from torch import Tensor

from performer_lm.ops.delta.blocks import (
    Block,
    Writes,
    maps_of_rows,
    open_block,
    pull_unit,
    scale_by_decay,
    take_block,
)
from performer_lm.ops.delta.walk import carry_at_once, carry_in_place, return_at_once, return_in_place
from performer_lm.ops.linear.chunks import multiply
from performer_lm.ops.linear.fading import sum_up_to
from performer_lm.ops.linear.state import Geometry, Scratch
from performer_lm.ops.linear.tokens import by_key_heads, cut
from performer_lm.ops.maps import Maps

Trace = tuple[Tensor, Tensor, Tensor, Tensor]


def attend(maps: Maps, geometry: Geometry, tokens: Writes, memory: Tensor, *, keep: bool) -> Trace:
    """Write and read a sequence from a memory `(x, m, e)`.

    Returns:
        The output `(b, h, n, e)`, the errors `(b, g, n, e)` and the memory before each block `(blocks, x, m, e)` (none
        of both where they are not to be kept), and the memory after the last.
    """
    (b, h, n, _), (g, e) = tokens.queries.shape, tokens.values.shape[1::2]
    scratch = Scratch(memory.dtype, memory.device)
    blocks, memory = list(cut(n, geometry.block, geometry.tile)), memory.clone(memory_format=torch.contiguous_format)
    out, errors = memory.new_empty(b, h, n, e), memory.new_empty(b, g, n if keep else 0, e)
    kept = memory.new_empty(len(blocks) if keep else 0, *memory.shape)
    carry = carry_in_place if geometry.one_scale else carry_at_once
    room, room_for_errors = by_key_heads(out, g), errors.transpose(0, 1)
    for index, part in enumerate(blocks):
        if keep:
            kept[index] = memory
        taken = take_block(tokens, part, geometry.tile, scratch)
        block = open_block(maps, taken, memory.shape[1], scratch)
        seen, found, memory = carry(block, taken, memory, scratch)
        if keep:
            place = room_for_errors[:, :, part]
            place.copy_(found.view(place.shape))
        multiply(block.scores, found.mul_(taken.beta[..., None]), out=seen, add=True)
        room[:, :, part].copy_(seen.view(room[:, :, part].shape))
    return out, errors, kept, memory


def pull(
    maps: Maps,
    geometry: Geometry,
    tokens: Writes,
    trace: Trace,
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
        trace: what the forward returned, its errors and memories kept.
        grad: `(b, h, n, e)`, at the output, if there is any.
        grad_memory: `(x, m, e)`, at the memory after the last token, if there is any.
        wanted: whether the maps' tensors want gradients.

    Returns:
        The gradients at tokens, the memory and the maps' tensors.
    """
    out, errors, kept, after = trace
    g = tokens.keys.shape[1]
    scratch = Scratch(after.dtype, after.device)
    q, k, v, beta = (torch.empty_like(x) for x in tokens[:4])
    found = Writes(q, k, v, beta, None if tokens.log_decay is None else torch.empty_like(tokens.log_decay), None, None)
    totals = [torch.zeros_like(x) if wanted else None for x in maps.tensors]
    grad = torch.zeros_like(out) if grad is None else grad
    like = torch.zeros_like(after) if grad_memory is None else grad_memory
    grad_memory = like.clone(memory_format=torch.contiguous_format)
    places = [by_key_heads(q, g), *(None if x is None else x.transpose(0, 1) for x in found[1:5])]
    results = by_key_heads(out, g), by_key_heads(grad, g), errors.transpose(0, 1)
    for index, part in reversed(list(enumerate(cut(out.shape[2], geometry.block, geometry.tile)))):
        taken = take_block(tokens, part, geometry.tile, scratch)
        ends = (kept[index], after, grad_memory)
        seen, at_seen, own_errors = (x[:, :, part] for x in results)
        pulled, grad_memory = _pull_block(maps, geometry, taken, (seen, at_seen, own_errors), ends, totals, scratch)
        after = kept[index]
        for place, piece in zip(places, pulled, strict=True):
            if place is not None and piece is not None:
                place[:, :, part].copy_(piece.reshape(place[:, :, part].shape))
    return found, grad_memory, totals


def _pull_block(
    maps: Maps,
    geometry: Geometry,
    tokens: Writes,
    results: tuple[Tensor, Tensor, Tensor],
    ends: tuple[Tensor, Tensor, Tensor],
    totals: list[Tensor | None],
    scratch: Scratch,
) -> tuple[list[Tensor | None], Tensor]:
    """Pull gradients back through a block.

    Args:
        maps: of queries and keys, like geometry.
        geometry: of blocks.
        tokens: of the block.
        results: outputs and the gradients at them `(g, b, n, r, e)`, and errors `(g, b, n, e)`, of its tokens.
        ends: the memories before and after it, and the gradient at the latter, `(x, m, e)`, which is overwritten.
        totals: where gradients at the maps' tensors are added.
        scratch: memory to work in.

    Returns:
        The gradients at its tokens, and at the memory before it.
    """
    block = open_block(maps, tokens, ends[0].shape[1], scratch)
    (x, t, asked, c), (out, grad, errors), features = block.scores.shape, results, block.features
    e, at_end = out.shape[-1], (ends[1] * ends[2]).sum(dim=(1, 2))
    given = scratch("given", x, t, asked + c, e)  # N
    given[:, :, :asked] = grad.reshape(x, t, asked, e)
    errors = scratch.take("errors", errors).view(x, t, c, e)
    walk_back = return_in_place if geometry.one_scale else return_at_once
    before, early, grad_written, solved, grad_keys, grad_memory = walk_back(
        block, tokens, errors, given, (ends[0], ends[2]), scratch
    )
    torch.neg(solved, out=given[:, :, asked:])
    written = torch.mul(errors, tokens.beta[..., None], out=scratch("written", *errors.shape))
    weights = multiply(given, written.mT, out=scratch("grad weights", x, t, asked + c, c))
    scale_by_decay(weights, block.fading)  # W
    grad_rows = multiply(weights, block.keys, out=scratch("grad rows", *features.shape))
    multiply(early, before.mT, out=grad_rows, add=True)
    grad_rows[:, :, asked:].add_(multiply(weights.mT, features, out=grad_keys, add=True))
    if tokens.mask is not None:
        grad_rows[:, :, asked:].masked_fill_(~tokens.mask[..., None], 0.0)
    undone = multiply(block.overlaps.mT, solved, out=scratch("undone", *errors.shape))
    grad_beta = grad_written.sub_(undone).mul_(errors).sum(dim=-1)
    log_decay = None
    if tokens.log_decay is not None:
        own = (out.reshape(x, t, asked, e) * given[:, :, :asked]).view(x, t, c, -1).sum(dim=-1)
        log_decay = _sum_from(own - (tokens.values * solved).sum(dim=-1), at_end, scratch)
    rows = _pull_rows(maps, tokens.queries, block, grad_rows, totals, scratch)
    return [rows[:, :, :asked], rows[:, :, asked:], solved, grad_beta, log_decay], grad_memory


def _sum_from(x: Tensor, at_end: Tensor, scratch: Scratch) -> Tensor:
    """Return the sums of `(x, t, c)` over all tokens from i on, and `at_end` `(x,)`."""
    upto = sum_up_to(x, scratch)
    tiles = upto[..., -1]
    later = sum_up_to(tiles, scratch)
    later = later[..., -1:] - later + at_end[:, None]
    return ((tiles + later)[..., None] - upto + x).to(x.dtype)


def _pull_rows(
    maps: Maps, rows: Tensor, block: Block, grad: Tensor, totals: list[Tensor | None], scratch: Scratch
) -> Tensor:
    """Pull the gradient at F back to the rows of queries and keys, and add that at the maps' tensors to the totals."""
    found: list[Tensor] = []
    first = 0
    for a_map, part in maps_of_rows(maps, block.queries.shape[2]):
        own = pull_unit(a_map, block.features[:, :, part], block.sizes[:, :, part], grad[:, :, part], scratch)
        wanted = any(total is not None for total in totals)
        pulled, tensors = a_map.pull(maps.flat(rows[:, :, part]), maps.flat(own), wanted=wanted)
        for total, more in zip(totals[first:], tensors, strict=False):
            if total is not None and more is not None:
                total.add_(more)
        found.append(pulled.view(rows[:, :, part].shape))
        first += len(a_map.tensors)
    return torch.cat(found, dim=2)
