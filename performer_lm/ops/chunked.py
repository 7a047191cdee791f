"""Softmax attention in chunks (Rabe & Staats, arXiv 2112.05682): the same result with no n x n matrix in memory.

For a chunk of queries, the keys pass by chunk after chunk; a running maximum, a running sum and the unnormalised output
are all that stays. The backward pass computes each block of weights again from the saved log-sum-exp. What touches a
block works in place in one of two buffers, since fresh memory costs more than arithmetic.

Letters: `b` batch, `h` heads, `g` key heads, `r` query heads per key head, `i` queries, `j` keys, `d` head width, `e`
value width, `c` and `s` query and key chunk, `x` = b g, `y` = r c.
"""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from performer_lm.ops.checks import fold_heads, gather_terms
from performer_lm.ops.chunks import Chunks, cut, front
from performer_lm.ops.precision import LOG2_E, no_autocast, sum_dtype
from performer_lm.ops.terms import Options, add_block


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_chunk_size: int | None = None,
    key_chunk_size: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Attend as `exact_attention` does, in O(i j) time and the memory of two blocks of scores beyond the outputs.

    Blocks that lie wholly in the future or outside the window are not computed (with a `key_mask` a window's reach is
    not known beforehand). A `mask` or `bias` given as a function is asked block by block, so that it needs no i x j
    memory; a `bias` tensor gets its gradient, a function gives none.

    Args:
        q: `(..., h, i, d)`.
        k: `(..., g, j, d)`.
        v: `(..., g, j, e)`.
        query_chunk_size: queries worked on together; by default as many as keep a block of scores in cache.
        key_chunk_size: keys worked on together; by default about 4 sqrt(j).
        options: those of `exact_attention`.

    Returns:
        `(..., h, i, e)` in q's dtype.

    Raises:
        ValueError: as `exact_attention`, and for a chunk size below 1.

    Examples:
        >>> import torch
        >>> from performer_lm.ops import chunked_attention
        >>> q, k, v = torch.randn(3, 2, 8, 1000, 16).unbind()
        >>> def nearer_is_better(queries, keys):
        ...     i, j = torch.arange(1000)[queries, None], torch.arange(1000)[keys]
        ...     return -(i - j).abs()
        >>> chunked_attention(q, k, v, bias=nearer_is_better, key_chunk_size=300).shape
        torch.Size([2, 8, 1000, 16])
    """
    terms = gather_terms(q, k, v, **options)
    with no_autocast(q.device):
        q_wide, k_wide, v_wide = fold_heads(q, k, v, dtype=sum_dtype(q, k, v))
        chunks = cut(k_wide.shape[0], terms, query_chunk_size, key_chunk_size)
        bias = terms.bias if isinstance(terms.bias, Tensor) else None
        out: Tensor = _ChunkedSoftmax.apply(q_wide, k_wide, v_wide, bias, terms.decay, chunks)
    return out.reshape(*q.shape[:-1], v.shape[-1]).to(q.dtype)


class _ChunkedSoftmax(torch.autograd.Function):
    """Queries in the outer loop, keys in the inner one, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, decay: Tensor | None, chunks: Chunks
    ) -> Tensor:
        """Return `(b, h, i, e)`; save the inputs, the output and the log-sum-exp."""
        queries, keys, values = _by_query_head(q, k), _by_key_head(k), _by_key_head(v)
        out = queries.new_empty(*queries.shape[:-1], v.shape[-1])
        log_total = queries.new_empty(*queries.shape[:-1], 1)
        memory = chunks.memory(keys)
        for rows in chunks.query_chunks():
            shape = queries[:, :, rows].shape[:-1]
            chunk, total = _attend_chunk(_flat(queries[:, :, rows]), keys, values, chunks, rows, memory)
            out[:, :, rows] = chunk.reshape(*shape, -1)
            log_total[:, :, rows] = total.reshape(*shape, 1)
        out = rearrange(out, "(b g) r i e -> b (g r) i e", b=q.shape[0])
        ctx.chunks = chunks
        ctx.save_for_backward(q, k, v, bias, decay, out, log_total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v, bias and decay."""
        q, k, v, bias, decay, out, log_total = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        queries, outs, upstreams = (_by_query_head(x, k) for x in (q, out, grad))
        keys, values = _by_key_head(k), _by_key_head(v)
        grads = _Gradients(
            q=torch.empty_like(queries),
            k=[torch.zeros_like(part) for part in keys.split(chunks.cols, dim=1)],
            v=[torch.zeros_like(part) for part in values.split(chunks.cols, dim=1)],
            bias=torch.zeros_like(bias) if ctx.needs_input_grad[3] else None,
            decay=torch.zeros_like(decay) if ctx.needs_input_grad[4] else None,
        )
        memories = chunks.memory(keys), chunks.memory(keys)
        for rows in chunks.query_chunks():
            query, out_chunk, upstream, total = (_flat(x[:, :, rows]) for x in (queries, outs, upstreams, log_total))
            average = (upstream * out_chunk).sum(-1, keepdim=True)
            grad_query = _differentiate_chunk(
                query, upstream, total, average, keys, values, chunks, rows, grads, memories
            )
            grads.q[:, :, rows] = grad_query.reshape(queries[:, :, rows].shape)
        grad_q = rearrange(grads.q, "(b g) r i d -> b (g r) i d", b=q.shape[0])
        grad_k, grad_v = (
            rearrange(torch.cat(x, dim=1), "(b g) j d -> b g j d", b=q.shape[0]) for x in (grads.k, grads.v)
        )
        return grad_q, grad_k.div_(LOG2_E), grad_v, grads.bias, grads.decay, None


def _attend_chunk(
    query: Tensor, keys: Tensor, values: Tensor, chunks: Chunks, rows: slice, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output `(x y e)` of one chunk of queries `(x y d)` and the log2 of their total weight `(x y 1)`."""
    query = query * (chunks.terms.scale * LOG2_E)
    # The lowest finite number, not -inf, is where the maximum starts: a row that sees no key yet stays free of NaN.
    maximum = query.new_full((*query.shape[:2], 1), torch.finfo(query.dtype).min)
    total = torch.zeros_like(maximum)
    out = query.new_zeros(*query.shape[:2], values.shape[-1])
    for cols in chunks.key_chunks(rows):
        scores = chunks.scores(query, keys[:, cols], rows, cols, memory)
        higher = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        shrink = maximum.sub_(higher).exp2_()
        weights = scores.sub_(higher).exp2_()
        total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        out.mul_(shrink).baddbmm_(chunks.drop(weights, rows, cols), values[:, cols])
        maximum = higher
    sees_none = total == 0
    # +inf for a row that sees no key: whatever weight is computed from it later is exp2(-inf) = 0.
    log_total = total.log2().add_(maximum).masked_fill_(sees_none, torch.inf)
    return out.div_(total.masked_fill_(sees_none, 1.0)), log_total


@dataclass(frozen=True)
class _Gradients:
    """The sums of the backward pass, block by block."""

    q: Tensor  # (x r i d)
    k: list[Tensor]  # (x s d) of each key chunk, for scores in units of log 2; whole, a part would not be contiguous,
    v: list[Tensor]  # (x s e) and the matrix product goes head by head
    bias: Tensor | None
    decay: Tensor | None  # (b g j)

    def add_scores(self, block: Tensor, rows: slice, cols: slice) -> None:
        """Add the gradient of one block of scores, `(b, h, rows, cols)`, to bias and decay.

        The decay of the query's own place shifts its whole row, which softmax does not feel: the key's part is all.
        """
        if self.bias is not None:
            add_block(self.bias, block, rows, cols)
        if self.decay is not None:
            per_head = block.sum(2)
            self.decay[:, :, cols] += rearrange(per_head, "b (g r) s -> b g r s", g=self.decay.shape[1]).sum(2)


def _differentiate_chunk(
    query: Tensor,
    upstream: Tensor,
    log_total: Tensor,
    average: Tensor,
    keys: Tensor,
    values: Tensor,
    chunks: Chunks,
    rows: slice,
    grads: _Gradients,
    memories: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the gradient of one chunk of queries `(x y d)`, and add the others' to `grads`."""
    scale = chunks.terms.scale
    query = query * (scale * LOG2_E)
    grad_query = torch.zeros_like(query)
    for cols in chunks.key_chunks(rows):
        key, value, part = keys[:, cols], values[:, cols], cols.start // chunks.cols
        weights = chunks.scores(query, key, rows, cols, memories[0]).sub_(log_total).exp2_()
        grad_scores = torch.bmm(upstream, value.mT, out=front(memories[1], query, key))
        dropped = weights
        if chunks.terms.dropout > 0.0:
            chunks.drop(grad_scores, rows, cols)
            dropped = chunks.drop(weights.clone(), rows, cols)
        grads.v[part].baddbmm_(dropped.mT, upstream)
        grad_scores.sub_(average).mul_(weights)
        grad_query.baddbmm_(grad_scores, key)
        grads.k[part].baddbmm_(grad_scores.mT, query)
        grads.add_scores(chunks.per_head(grad_scores), rows, cols)
    return grad_query.mul_(scale)


def _by_query_head(x: Tensor, k: Tensor) -> Tensor:
    return rearrange(x, "b (g r) i d -> (b g) r i d", g=k.shape[1])


def _by_key_head(x: Tensor) -> Tensor:
    return rearrange(x, "b g j d -> (b g) j d")


def _flat(per_query_head: Tensor) -> Tensor:
    """Lay the query heads of one key head behind each other: `(x r c d) -> (x, y, d)`."""
    return rearrange(per_query_head, "x r c d -> x (r c) d")
