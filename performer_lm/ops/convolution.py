"""A short causal depthwise convolution, written as shifted products with a backward of its own.

Each channel is mixed with its own last `k` values: out_i = sum over s < k of w_s x_{i - s}. Neither direction copies
the input or keeps more than it, which on these shapes is several times faster than a grouped `conv1d`.
Letters: `b` batch, `n` tokens, `c` channels, `k` taps, `s` shift in tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def short_convolution(x: Tensor, tail: Tensor, weight: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """Convolve each channel causally with its own weights.

    Args:
        x: `(b, n, c)`.
        tail: `(b, k - 1, c)`, the values just before x.
        weight: `(k, c)`; `weight[s]` multiplies the value s tokens ago.
        segments: `(b, n)` document ids; values of other documents, and the tail, count as zeros.

    Returns:
        `(b, n, c)`.
    """
    if x.shape[1] == 1 and segments is None:  # decoding: one product for all taps
        return (torch.cat((tail, x), dim=1) * weight.flip(0)).sum(1, keepdim=True)
    if segments is None and not torch.compiler.is_compiling():
        return _ShortConvolution.apply(x, tail, weight)
    out = x * weight[0]
    for shift in range(1, weight.shape[0]):  # a compiler fuses these, and their backward
        past = torch.cat((tail[:, tail.shape[1] - shift :], x), dim=1)[:, : x.shape[1]]
        if segments is not None:
            same = F.pad(segments, (shift, 0), value=-1)[:, : segments.shape[1]] == segments
            past = past * same[..., None]
        out = torch.addcmul(out, past, weight[shift])
    return out


class _ShortConvolution(torch.autograd.Function):
    """The convolution of a stream that is one document."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, tail, weight)
        out = x * weight[0]
        for shift in range(1, weight.shape[0]):
            _late(out, shift).addcmul_(_early(x, shift), weight[shift])
            _first(out, shift).addcmul_(_before(tail, shift, x), weight[shift])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, tail, weight = ctx.saved_tensors
        grad_x, grad_tail = grad * weight[0], torch.zeros_like(tail)
        product = grad * x
        grads_weight = [product.sum((0, 1))]
        for shift in range(1, weight.shape[0]):
            late, first, before = _late(grad, shift), _first(grad, shift), _before(tail, shift, x)
            _early(grad_x, shift).addcmul_(late, weight[shift])
            _before(grad_tail, shift, x).addcmul_(first, weight[shift])
            torch.mul(late, _early(x, shift), out=_late(product, shift))
            torch.mul(first, before, out=_first(product, shift))
            grads_weight.append(product.sum((0, 1)))
        return grad_x, grad_tail, torch.stack(grads_weight)


def _late(stream: Tensor, shift: int) -> Tensor:
    """Return the tokens `(b, n - s, c)` that look back to another token of the stream."""
    return stream[:, shift:]


def _early(stream: Tensor, shift: int) -> Tensor:
    """Return the tokens `(b, n - s, c)` that those look back to."""
    return stream[:, : max(0, stream.shape[1] - shift)]


def _first(stream: Tensor, shift: int) -> Tensor:
    """Return the tokens `(b, min(s, n), c)` that look back into the tail."""
    return stream[:, :shift]


def _before(tail: Tensor, shift: int, x: Tensor) -> Tensor:
    """Return the values `(b, min(s, n), c)` of the tail that those look back to."""
    start = tail.shape[1] - shift
    return tail[:, start : start + min(shift, x.shape[1])]
