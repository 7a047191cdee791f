"""A block of the delta rule as matrices: tiles of tokens that are corrected together.

Inside a tile of c tokens the rule is a triangular system. With keys K, queries Q, values V, write strengths beta, the
memory S before the tile, D_ij = exp(sum of log_decay over j+1..i) for j <= i, and E_i that since the tile's start,

    B_ij = k_i . k_j D_ij beta_j, j < i          T = (I + B)^-1
    X = T (V - E K S)                            X_i is token i's error: v_i less what the memory held for it
    out = E (Q S) + P (beta X)                   P_ij = q_i . k_j D_ij
    S' = E_c S + (D_c K)^T (beta X)

(the WY form of Yang et al. 2412.06464, written for errors). All but X and S' is done for all tiles of a block at once;
`walk.py` carries the memory from tile to tile. Queries and keys share their products: F is Q with K below it.

Letters: `x` key heads times batch, `r` queries per key, `t` tiles, `c` tokens of one, `l` = c r + c rows of F, `d` head
width, `m` features, `e` value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.linear.chunks import multiply, scale_rows
from performer_lm.ops.linear.fading import Fading, fade
from performer_lm.ops.linear.state import Scratch
from performer_lm.ops.linear.tokens import by_key_heads
from performer_lm.ops.maps import BlockMap, Maps


class Writes(NamedTuple):
    """A run of tokens, whole or cut into tiles, or the gradients at one."""

    queries: Tensor  # (b, h, n, d); block (x, t, l, d): the keys are below them
    keys: Tensor  # (b, g, n, d); (x, t, c, d), a view of the same
    values: Tensor  # (b, g, n, e); (x, t, c, e), zero where masked
    beta: Tensor  # (b, g, n); (x, t, c), zero where masked
    log_decay: Tensor | None  # (b, g, n), 0 where masked; (x, t, c)
    mask: Tensor | None  # (b, n); (x, t, c): False keys are absent
    documents: Tensor | None  # (b, 1 + n); (x, t, 1 + c): the document of the token before stands first


def take_block(tokens: Writes, part: slice, tile: int, scratch: Scratch) -> Writes:
    """Copy a block out of a sequence, in whole tiles or one part of a tile."""
    queries = by_key_heads(tokens.queries[:, :, part], tokens.keys.shape[1])
    keys, values = tokens.keys[:, :, part].transpose(0, 1), tokens.values[:, :, part].transpose(0, 1)
    g, b, n, r, d = queries.shape
    t = max(1, n // tile)
    c, shape = n // t, (g * b, t, n // t)
    rows = scratch("rows", g, b, t, c * r + c, d)
    rows[..., : c * r, :].unflatten(3, (c, r)).copy_(queries.unflatten(2, (t, c)))
    rows[..., c * r :, :].copy_(keys.unflatten(2, (t, c)))
    rows = rows.flatten(0, 1)
    keys = rows[:, :, c * r :]
    values = scratch("values", *values.shape).copy_(values).view(*shape, values.shape[-1])
    beta = tokens.beta[:, :, part].transpose(0, 1).to(rows.dtype).reshape(shape)
    log_decay = None if tokens.log_decay is None else tokens.log_decay[:, :, part].transpose(0, 1).reshape(shape)
    mask = None if tokens.mask is None else tokens.mask[:, part].expand(g, -1, -1).reshape(shape)
    if mask is not None:
        for x in (keys, values):
            x.masked_fill_(~mask[..., None], 0.0)
        beta = beta.masked_fill(~mask, 0.0)
    documents = None
    if tokens.documents is not None:
        around = tokens.documents.expand(g, -1, -1)[:, :, part.start : part.stop + 1].reshape(g * b, n + 1)
        documents = around.unfold(1, c + 1, c)
    return Writes(rows, keys, values, beta, log_decay, mask, documents)


class Block(NamedTuple):
    """A block as matrices."""

    features: Tensor  # (x, t, l, m): F
    queries: Tensor  # (x, t, c r, m): Q, a view of F
    keys: Tensor  # (x, t, c, m): K, zero where masked, a view of F
    scores: Tensor  # (x, t, c r, c): P
    overlaps: Tensor  # (x, t, c, c): k_i . k_j D_ij, j < i
    inverse: Tensor  # (x, t, c, c): T
    sizes: Tensor  # (x, t, l, 1): 1 / |features|, where they are no logarithms
    fading: Fading


def open_block(maps: Maps, tokens: Writes, num_features: int, scratch: Scratch) -> Block:
    """Compute a block's matrices in `scratch`."""
    (x, t, rows, _), c = tokens.queries.shape, tokens.keys.shape[2]
    fading = fade(tokens.log_decay, tokens.documents, scratch, c, gains=False)
    features = scratch("features", x, t, rows, num_features)
    sizes: list[Tensor] = []
    for a_map, part in maps_of_rows(maps, rows - c):
        sizes.append(write_unit(a_map, maps, tokens.queries[:, :, part], features[:, :, part]))
    queries, keys = features[:, :, : rows - c], features[:, :, rows - c :]
    if tokens.mask is not None:
        keys.masked_fill_(~tokens.mask[..., None], 0.0)
    weights = scale_by_decay(multiply(features, keys.mT, out=scratch("weights", x, t, rows, c)), fading)
    overlaps = weights[:, :, rows - c :]
    identity = torch.eye(c, dtype=overlaps.dtype, device=overlaps.device).expand_as(overlaps)
    lower = overlaps * tokens.beta[..., None, :]
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
    return Block(features, queries, keys, weights[:, :, : rows - c], overlaps, inverse, torch.cat(sizes, dim=2), fading)


def scale_by_decay(weights: Tensor, fading: Fading) -> Tensor:
    """Multiply `(x, t, l, c)` by D in place; a key has no weight at itself, only at later ones."""
    c = weights.shape[-1]
    for rows in weights.split([weights.shape[2] - c, c], dim=2):
        scale_rows(rows, fading.between)
    weights[:, :, -c:].diagonal(dim1=-2, dim2=-1).zero_()
    return weights


def maps_of_rows(maps: Maps, asked: int) -> list[tuple[BlockMap, slice]]:
    """Return the maps of F's rows, of which `asked` are queries: one for all of them where both maps write alike."""
    if maps.query.writes_like(maps.key):
        return [(maps.key, slice(None))]
    return [(maps.query, slice(asked)), (maps.key, slice(asked, None))]


def write_unit(a_map: BlockMap, maps: Maps, x: Tensor, out: Tensor) -> Tensor:
    """Write a map's features of x to `out`, each token's scaled to length one, and return 1 / length.

    What is common to a token's log features, as -|x|^2 / 2 is, cancels and is left out. Features are divided by the
    largest before they are squared, so that no square vanishes or is infinite. A token without features keeps none,
    and its 1 / length is 0, so that it gets no gradient.
    """
    flat = maps.flat(out)
    a_map.write(maps.flat(x), flat, add=False)
    if not out.is_contiguous():  # then `flat` is memory of its own
        out.copy_(flat.view(out.shape))
    if a_map.logarithmic:
        out.sub_(out.amax(dim=-1, keepdim=True)).exp2_()
        inverse = torch.linalg.vector_norm(out, dim=-1, keepdim=True).reciprocal_()
        out.mul_(inverse)
        return inverse
    limits = torch.finfo(out.dtype)
    lowest, highest = out.amin(dim=-1, keepdim=True), out.amax(dim=-1, keepdim=True)  # a maximum norm is slow
    largest = torch.maximum(highest, lowest.neg_()).clamp_min_(limits.tiny)
    length = torch.linalg.vector_norm(out.div_(largest), dim=-1, keepdim=True)
    inverse = torch.where(length == 0, 0.0, length.reciprocal())
    out.mul_(inverse)
    return inverse.div_(largest).clamp_max_(limits.max)


def pull_unit(a_map: BlockMap, features: Tensor, inverse: Tensor, grad: Tensor, scratch: Scratch) -> Tensor:
    """Turn the gradient at unit features, in place, into that at the map's features, or at their natural logarithms."""
    along = torch.mul(features, grad, out=scratch("along", *grad.shape)).sum(dim=-1, keepdim=True)
    grad.addcmul_(features, along, value=-1.0)
    return grad.mul_(features if a_map.logarithmic else inverse)
