"""A block of the delta rule as matrices: tiles of tokens that are corrected together.

Inside a tile of c tokens the rule is a triangular system. With keys K, queries Q, values V, write strengths beta, the
memory S before the tile, D_ij = exp(sum of log_decay over j+1..i) for j <= i, and E_i that since the tile's start,

    B_ij = k_i . k_j D_ij beta_j, j < i          T = (I + B)^-1
    X = T V - T (E K) S                          X_i is token i's error: v_i less what the memory held for it
    out = E (Q S) + P (beta X)                   P_ij = q_i . k_j D_ij
    S' = E_c S + (D_c K)^T (beta X)

(the WY form of Yang et al. 2412.06464, written for errors). All but X and S' is done for all tiles of a block at once;
`sequence.py` carries the memory from tile to tile.

Letters: `x` key heads times batch, `r` queries per key, `t` tiles, `c` tokens of one, `d` head width, `m` features,
`e` value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.delta.inverse import invert_unit_lower
from performer_lm.ops.linear.chunks import multiply, scale_rows
from performer_lm.ops.linear.fading import Fading, fade
from performer_lm.ops.linear.state import Scratch
from performer_lm.ops.maps import BlockMap, Maps


class Writes(NamedTuple):
    """A run of tokens, whole or cut into tiles, or the gradients at one."""

    queries: Tensor  # (b, h, n, d); block (x, t, c r, d)
    keys: Tensor  # (b, g, n, d); (x, t, c, d)
    values: Tensor  # (b, g, n, e); (x, t, c, e), zero where masked
    beta: Tensor  # (b, g, n); (x, t, c), zero where masked
    log_decay: Tensor | None  # (b, g, n), 0 where masked; (x, t, c)
    mask: Tensor | None  # (b, n); (x, t, c): False keys are absent
    documents: Tensor | None  # (b, 1 + n); (x, t, 1 + c): the document of the token before stands first


class Block(NamedTuple):
    """A block as matrices."""

    queries: Tensor  # (x, t, c r, m): Q
    keys: Tensor  # (x, t, c, m): K, zero where masked
    scores: Tensor  # (x, t, c r, c): P
    overlaps: Tensor  # (x, t, c, c): k_i . k_j D_ij, j < i
    inverse: Tensor  # (x, t, c, c): T
    own: Tensor  # (x, t, c, e): T V
    reach: Tensor  # (x, t, c, m): T (E K)
    fading: Fading
    sizes: tuple[Tensor, Tensor]  # (x, t, c r, 1), (x, t, c, 1): 1 / |features|, where they are no logarithms


def open_block(maps: Maps, tokens: Writes, num_features: int, scratch: Scratch) -> Block:
    """Compute a block's matrices in `scratch`."""
    x, t, c, _ = tokens.keys.shape
    fading = fade(tokens.log_decay, tokens.documents, scratch, c, gains=False)
    queries, query_sizes = write_unit(
        maps.query, maps, tokens.queries, scratch("queries", *tokens.queries.shape[:3], num_features)
    )
    keys, key_sizes = write_unit(maps.key, maps, tokens.keys, scratch("keys", x, t, c, num_features))
    if tokens.mask is not None:
        keys.masked_fill_(~tokens.mask[..., None], 0.0)
    scores = multiply(queries, keys.mT, out=scratch("scores", *queries.shape[:3], c))
    scale_rows(scores, fading.between)
    overlaps = multiply(keys, keys.mT, out=scratch("overlaps", x, t, c, c))
    scale_rows(overlaps, fading.between).tril_(-1)
    inverse = invert_unit_lower(overlaps * tokens.beta[..., None, :])
    early = inverse if fading.since_start is None else inverse * fading.since_start[..., 0].mT
    return Block(
        queries,
        keys,
        scores,
        overlaps,
        inverse,
        multiply(inverse, tokens.values, out=scratch("own", x, t, c, tokens.values.shape[-1])),
        multiply(early, keys, out=scratch("reach", x, t, c, num_features)),
        fading,
        (query_sizes, key_sizes),
    )


def write_unit(a_map: BlockMap, maps: Maps, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write a map's features of x to `out`, each token's scaled to length one; return them and 1 / length.

    What is common to a token's log features, as -|x|^2 / 2 is, cancels and is left out. Features are divided by the
    largest before they are squared, so that no square vanishes or is infinite. A token without features keeps none,
    and its 1 / length is 0, so that it gets no gradient.
    """
    flat = maps.flat(out)
    a_map.write(maps.flat(x), flat, add=False)
    if a_map.logarithmic:
        out.sub_(out.amax(dim=-1, keepdim=True)).exp2_()
        inverse = torch.linalg.vector_norm(out, dim=-1, keepdim=True).reciprocal_()
        return out.mul_(inverse), inverse
    limits = torch.finfo(out.dtype)
    largest = torch.linalg.vector_norm(out, ord=torch.inf, dim=-1, keepdim=True).clamp_min_(limits.tiny)
    length = torch.linalg.vector_norm(out.div_(largest), dim=-1, keepdim=True)
    inverse = torch.where(length == 0, 0.0, length.reciprocal())
    return out.mul_(inverse), inverse.div_(largest).clamp_max_(limits.max)


def pull_unit(a_map: BlockMap, features: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
    """Turn the gradient at unit features, in place, into that at the map's features, or at their natural logarithms."""
    along = (features * grad).sum(dim=-1, keepdim=True)
    grad.addcmul_(features, along, value=-1.0)
    return grad.mul_(features if a_map.logarithmic else inverse)
