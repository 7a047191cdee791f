"""Cross-entropy of a linear output layer that never holds all logits: a block of positions at a time, both ways.

The plain form holds a logit for every position and word, their softmax and its gradient. Here forward keeps one number
a position, the logarithm of its softmax's denominator, and backward computes each block's logits anew.
Letters: `n` positions, `c` positions of a block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from performer_lm.ops.precision import no_autocast, sum_dtype


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_size: int,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return -log softmax(hidden weight^T + bias)[target] of every position, in O(chunk_size vocab) memory.

    Products are computed in the inputs' dtype, or autocast's; softmax, losses and the sums of gradients over blocks in
    float32 or wider.

    Args:
        hidden: `(..., dim)`.
        weight: `(vocab, dim)`, the output layer's.
        targets: `(...)` ids.
        chunk_size: positions whose logits are held at once.
        bias: `(vocab,)`, added to the logits.
        ignore_index: the target of positions that do not count: their loss and gradient are zero.

    Returns:
        `(...)` nats.

    Raises:
        ValueError: for shapes that do not fit, or a chunk_size below 1.

    Examples:
        >>> import torch
        >>> from performer_lm.ops import linear_cross_entropy
        >>> hidden, weight, targets = torch.randn(2, 10, 16), torch.randn(100, 16), torch.randint(100, (2, 10))
        >>> linear_cross_entropy(hidden, weight, targets, chunk_size=4).shape
        torch.Size([2, 10])
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1] or weight.ndim != 2:
        raise ValueError(
            f"wanted hidden (..., dim), weight (vocab, dim) and targets (...), got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    flat = hidden.flatten(0, -2), weight, bias, targets.flatten()
    return _LinearCrossEntropy.apply(*flat, chunk_size, ignore_index, dtype).reshape(targets.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """The losses `(n,)` of hidden `(n, dim)`, weight `(vocab, dim)` and targets `(n,)`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        columns = weight.to(dtype).mT
        nats, log_totals = [], []
        with no_autocast(hidden.device, ieee=False):
            for x, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
                logits = _logits(x, columns, bias)
                log_total = logits.logsumexp(-1)
                counts = target != ignore_index
                chosen = logits.gather(-1, torch.where(counts, target, 0)[:, None])[:, 0]
                nats.append(torch.where(counts, log_total - chosen, 0.0))
                log_totals.append(log_total)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(log_totals))
        ctx.chunk_size, ctx.ignore_index, ctx.dtype = chunk_size, ignore_index, dtype
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_totals = ctx.saved_tensors
        rows = weight.to(ctx.dtype)
        counts = targets != ctx.ignore_index
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if ctx.needs_input_grad[2] else None
        with no_autocast(hidden.device, ieee=False):
            for start in range(0, len(hidden), ctx.chunk_size):
                part = slice(start, start + ctx.chunk_size)
                x = hidden[part]
                shares = _logits(x, rows.mT, bias).sub_(log_totals[part, None]).exp_()
                target = torch.where(counts[part], targets[part], 0)[:, None]
                shares.scatter_add_(-1, target, shares.new_full((), -1.0).expand_as(target))
                shares.mul_(torch.where(counts[part], grad[part], 0.0)[:, None])
                if grad_bias is not None:
                    grad_bias += shares.sum(0)
                shares = shares.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = shares @ rows
                if grad_weight is not None:
                    grad_weight += shares.mT @ x.to(ctx.dtype)
        grad_weight, grad_bias = (
            None if found is None else found.to(like.dtype)
            for found, like in ((grad_weight, weight), (grad_bias, bias))
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """Return x `(c, dim)` times columns `(dim, vocab)`, widened for sums, with the bias `(vocab,)`."""
    logits = x.to(columns.dtype) @ columns
    logits = logits.to(sum_dtype(logits))
    return logits if bias is None else logits.add_(bias)
