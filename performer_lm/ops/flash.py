"""FlashAttention written out, to be read: tiles that fit on chip, one pass over the keys, nothing n x n kept.

Forward and backward are Algorithms 1, 2 and 4 of FlashAttention (arXiv 2205.14135) in the loop order of
FlashAttention-2 (arXiv 2307.08691): each tile of queries goes over all keys and is written once; backward, each tile of
keys goes over all queries. On a GPU a tile is one block of threads and its scores never leave the chip; here a tile is
one step of a Python loop, on any device.

Letters: `b` batch, `h` heads, `g` key heads, `r` query heads per key head, `i` queries, `j` keys, `d` head width, `e`
value width; `c` queries and `s` keys of one tile.
"""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from performer_lm.ops.checks import fold_heads, gather_terms
from performer_lm.ops.precision import no_autocast, sum_dtype
from performer_lm.ops.terms import Options, Terms, add_block, slices

ON_CHIP = 48 * 1024  # numbers; the 192 KiB of shared memory that one A100 multiprocessor has, in float32


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, *, on_chip: int = ON_CHIP, **options: Unpack[Options]) -> Tensor:
    """Attend as `exact_attention` does, in O(i j) time and O(i) memory beyond inputs and outputs.

    Args:
        q: `(..., h, i, d)`.
        k: `(..., g, j, d)`.
        v: `(..., g, j, e)`.
        on_chip: numbers that fast memory holds (M in the paper); it decides the tiles (`tile_sizes`).
        options: those of `exact_attention`.

    Returns:
        `(..., h, i, e)` in q's dtype.

    Raises:
        ValueError: as `exact_attention`, and for `on_chip` below 1.

    Examples:
        >>> import torch
        >>> from performer_lm.ops import tiled_attention
        >>> q, k, v = torch.randn(3, 2, 8, 300, 16).unbind()
        >>> tiled_attention(q, k, v, causal=True, window=100).shape
        torch.Size([2, 8, 300, 16])
    """
    return tiled_attention_and_logsumexp(q, k, v, on_chip=on_chip, **options)[0]


def tiled_attention_and_logsumexp(
    q: Tensor, k: Tensor, v: Tensor, *, on_chip: int = ON_CHIP, **options: Unpack[Options]
) -> tuple[Tensor, Tensor]:
    """Attend as `tiled_attention`, and return with it the log of each query's total weight, `(..., h, i)`.

    With it, attention over two sets of keys can be merged: the outputs weigh as softmax of the two log-sum-exps. It has
    its gradient, is float32 or wider, and -inf where a query sees no key. Dropout does not change it.
    """
    terms = gather_terms(q, k, v, **options)
    with no_autocast(q.device):
        q_wide, k_wide, v_wide = fold_heads(q, k, v, dtype=sum_dtype(q, k, v))
        q_wide = rearrange(q_wide, "b (g r) i d -> b g r i d", g=terms.groups)
        tiles = _Tiles(terms, *tile_sizes(on_chip, max(q.shape[-1], v.shape[-1])))
        bias = terms.bias if isinstance(terms.bias, Tensor) else None
        out, logsumexp = _FlashSoftmax.apply(q_wide, k_wide, v_wide, bias, terms.decay, tiles)
    shape = q.shape[:-1]
    return out.reshape(*shape, v.shape[-1]).to(q.dtype), logsumexp.reshape(shape)


def tile_sizes(on_chip: int, width: int) -> tuple[int, int]:
    """Return how many queries and keys of `width` make a tile: M / 4d keys, so that q, k, v and o share the memory.

    Algorithm 1, line 1; queries no more than `width`, so that their scores fit as well.
    """
    if on_chip < 1:
        raise ValueError(f"on_chip must be at least 1, got {on_chip}")
    cols = -(-on_chip // (4 * width))
    return min(cols, width), cols


@dataclass(frozen=True)
class _Tiles:
    """How one call is cut, and the scores of a tile."""

    terms: Terms
    rows: int
    cols: int

    def scores(self, query: Tensor, key: Tensor, rows: slice, cols: slice) -> Tensor:
        """Compute `(b g r c d), (b g s d) -> (b g r c s)`, with all that is added to it or hidden."""
        scores = einsum(query * self.terms.scale, key, "b g r c d, b g s d -> b g r c s")
        self.terms.add_to(rearrange(scores, "b g r c s -> b (g r) c s"), rows, cols)
        return scores

    def drop(self, weights: Tensor, rows: slice, cols: slice) -> Tensor:
        """Drop weights, or their gradients, `(b g r c s)`."""
        if self.terms.dropout == 0.0:
            return weights
        kept = self.terms.kept(rearrange(weights, "b g r c s -> b (g r) c s"), rows, cols)
        return weights * rearrange(kept, "b (g r) c s -> b g r c s", g=self.terms.groups)


class _FlashSoftmax(torch.autograd.Function):
    """q `(b g r i d)`, k `(b g j d)`, v `(b g j e)` -> out `(b g r i e)` and log-sum-exp `(b g r i)`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, decay: Tensor | None, tiles: _Tiles
    ) -> tuple[Tensor, Tensor]:
        out, logsumexp = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])
        for rows in slices(tiles.terms.queries, tiles.rows):
            out[..., rows, :], logsumexp[..., rows] = _attend_tile(q[..., rows, :], k, v, tiles, rows)
        ctx.tiles = tiles
        ctx.save_for_backward(q, k, v, bias, decay, out, logsumexp)
        return out, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, decay, out, logsumexp = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        grad_decay = torch.zeros_like(decay) if ctx.needs_input_grad[4] else None
        # D of the paper: what softmax's gradient subtracts. A gradient of the log-sum-exp enters at the same place.
        subtract = ((grad_out * out).sum(-1) - grad_logsumexp)[..., None]
        # +inf for a query that sees no key, so that its weights are exp(-inf) = 0 and not NaN
        total = logsumexp.masked_fill(logsumexp.isneginf(), torch.inf)[..., None]
        for cols in slices(tiles.terms.keys, tiles.cols):
            key, value = k[..., cols, :], v[..., cols, :]
            grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
            for rows in slices(tiles.terms.queries, tiles.rows):
                if tiles.terms.is_empty(rows, cols):
                    continue
                query, grad = q[..., rows, :], grad_out[..., rows, :]
                weights = torch.exp(tiles.scores(query, key, rows, cols) - total[..., rows, :])
                dropped = tiles.drop(weights, rows, cols)
                grad_value += einsum(dropped, grad, "b g r c s, b g r c e -> b g s e")
                grad_dropped = einsum(grad, value, "b g r c e, b g s e -> b g r c s")
                grad_scores = weights * (tiles.drop(grad_dropped, rows, cols) - subtract[..., rows, :])
                grad_q[..., rows, :] += einsum(grad_scores, key, "b g r c s, b g s d -> b g r c d") * tiles.terms.scale
                grad_key += einsum(grad_scores, query, "b g r c s, b g r c d -> b g s d") * tiles.terms.scale
                if grad_bias is not None:
                    add_block(grad_bias, rearrange(grad_scores, "b g r c s -> b (g r) c s"), rows, cols)
                if grad_decay is not None:
                    grad_decay[..., cols] += grad_scores.sum((2, 3))
                    grad_decay[..., tiles.terms.rows_at(rows)] -= grad_scores.sum((2, 4))
            grad_k[..., cols, :], grad_v[..., cols, :] = grad_key, grad_value
        return grad_q, grad_k, grad_v, grad_bias, grad_decay, None


def _attend_tile(query: Tensor, k: Tensor, v: Tensor, tiles: _Tiles, rows: slice) -> tuple[Tensor, Tensor]:
    """Take one tile of queries `(b g r c d)` over all keys: its output `(b g r c e)` and log-sum-exp `(b g r c)`."""
    lowest = torch.finfo(query.dtype).min
    out = query.new_zeros(*query.shape[:-1], v.shape[-1])
    maximum, total = query.new_full((*query.shape[:-1], 1), lowest), query.new_zeros(*query.shape[:-1], 1)
    for cols in slices(tiles.terms.keys, tiles.cols):
        if tiles.terms.is_empty(rows, cols):
            continue
        scores = tiles.scores(query, k[..., cols, :], rows, cols)
        higher = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights, shrink = torch.exp(scores - higher), torch.exp(maximum - higher)
        total = total * shrink + weights.sum(-1, keepdim=True)
        dropped = tiles.drop(weights, rows, cols)
        out = out * shrink + einsum(dropped, v[..., cols, :], "b g r c s, b g s e -> b g r c e")
        maximum = higher
    logsumexp = maximum + total.log()  # -inf where total is 0: the maximum is finite
    return out / total.masked_fill(total == 0, 1.0), logsumexp[..., 0]
