"""Cheap order and locality before attention: a token shift, a short causal convolution, decay that depends on the data.

With them, random-feature attention trains as well as softmax given the same; without them it does not.
Letters: `b` batch, `g` key heads, `n` tokens, `c` channels, `k` taps, `s` shift in tokens.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from performer_lm.ops.precision import widen
from performer_lm.ranges import Count, ranged


class TokenShift(nn.Module):
    """Replace part of each token's channels by those of a neighbour: zeros beside ends, pads, other documents.

    Causal: the second half of the channels comes from the token before. Else the first third comes from the token
    after and the last from the token before. No weights.

    Raises:
        ValueError: for a dim without a channel for each part.
    """

    def __init__(self, dim: int, *, causal: bool) -> None:
        super().__init__()
        parts = 2 if causal else 3
        if dim < parts:
            raise ValueError(f"token_shift needs a dim of at least {parts}, got {dim}")
        self.size = dim // parts
        self.causal = causal

    def init_tail(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the zeros `(b, 1, c)` that stand before the first token."""
        return torch.zeros(batch, 1, self.size, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, tail: Tensor | None = None, *, mask: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map `(b, n, dim)` and the tail `(b, 1, c)`, None at the start, to `(b, n, dim)` and the next tail.

        The tail is the shifted channels of the last token.
        """
        tail = self.init_tail(x.shape[0], device=x.device, dtype=x.dtype) if tail is None else tail
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
        parts = list(x.split(self.size, dim=2))  # what does not divide stays at the end, unshifted
        before = 1 if self.causal else 2
        if not self.causal:
            parts[0] = _from_after(parts[0], segments)
        found = parts[before]
        parts[before] = _from_before(found, tail, segments)
        return torch.cat(parts, dim=2), torch.cat((tail.to(x.dtype), found), dim=1)[:, -1:]


def _from_before(x: Tensor, tail: Tensor, segments: Tensor | None) -> Tensor:
    """Give each token the values `(b, n, c)` of the token before in the same document."""
    shifted = torch.cat((tail.to(x.dtype), x), dim=1)[:, :-1]
    if segments is None:
        return shifted
    follows = F.pad(segments[:, 1:] == segments[:, :-1], (1, 0), value=False)
    return shifted * follows[..., None].to(x.dtype)


def _from_after(x: Tensor, segments: Tensor | None) -> Tensor:
    """Give each token the values `(b, n, c)` of the token after in the same document."""
    shifted = F.pad(x, (0, 0, 0, 1))[:, 1:]
    if segments is None:
        return shifted
    leads = F.pad(segments[:, 1:] == segments[:, :-1], (0, 1), value=False)
    return shifted * leads[..., None].to(x.dtype)


@ranged
class ShortConvolution(nn.Module):
    """Mix the last `taps` values of each channel, then apply SiLU: depthwise, causal, zero before the start."""

    def __init__(self, channels: int, *, taps: Count) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(taps, channels))  # weight[s] multiplies the value s tokens ago

    def init_tail(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the zeros `(b, k - 1, c)` that stand before the first token."""
        return torch.zeros(batch, self.taps - 1, self.weight.shape[1], device=device, dtype=dtype)

    def forward(
        self, x: Tensor, tail: Tensor | None = None, *, mask: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map `(b, n, c)` and the tail `(b, k - 1, c)` to `(b, n, c)` and the next tail.

        Args:
            x: `(b, n, c)`.
            tail: `(b, k - 1, c)`, the inputs just before x; None at the start of a sequence.
            mask: `(b, n)` bool; tokens marked False count as zeros.
            segments: `(b, n)` document ids; nothing crosses from one document to the next.
        """
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
        kept = self.taps - 1
        tail = x.new_zeros(x.shape[0], kept, x.shape[2]) if tail is None else tail.to(x.dtype)
        mixed = short_convolution(x, tail, self.weight.to(x.dtype), segments=segments)
        next_tail = x[:, x.shape[1] - kept :] if x.shape[1] > kept else torch.cat((tail, x), dim=1)[:, x.shape[1] :]
        return F.silu(mixed), next_tail.clone()  # a clone, so that a decoding state does not hold on to all of x


def short_convolution(x: Tensor, tail: Tensor, weight: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """Convolve each channel causally with its own weights: out_i = sum over s < k of w_s x_{i - s}.

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
        return _ShiftedProducts.apply(x, tail, weight)
    out = x * weight[0]
    for shift in range(1, weight.shape[0]):  # a compiler fuses these, and their backward
        past = torch.cat((tail[:, tail.shape[1] - shift :], x), dim=1)[:, : x.shape[1]]
        if segments is not None:
            same = F.pad(segments, (shift, 0), value=-1)[:, : segments.shape[1]] == segments
            past = past * same[..., None]
        out = torch.addcmul(out, past, weight[shift])
    return out


class _ShiftedProducts(torch.autograd.Function):
    """The convolution of a stream that is one document.

    Neither direction copies the input or keeps more than it, which on these shapes is several times faster than a
    grouped `conv1d`. Of each shift, the first tokens look back into the tail, from `start` on, and the others to tokens
    of the stream.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, tail, weight)
        out = x * weight[0]
        for shift in range(1, weight.shape[0]):
            first, start = min(shift, x.shape[1]), tail.shape[1] - shift
            out[:, first:].addcmul_(x[:, : x.shape[1] - first], weight[shift])
            out[:, :first].addcmul_(tail[:, start : start + first], weight[shift])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, tail, weight = ctx.saved_tensors
        grad_x, grad_tail = grad * weight[0], torch.zeros_like(tail)
        product = grad * x
        grads_weight = [product.sum((0, 1))]
        for shift in range(1, weight.shape[0]):
            first, start = min(shift, x.shape[1]), tail.shape[1] - shift
            early, before = slice(x.shape[1] - first), slice(start, start + first)
            grad_x[:, early].addcmul_(grad[:, first:], weight[shift])
            grad_tail[:, before].addcmul_(grad[:, :first], weight[shift])
            torch.mul(grad[:, first:], x[:, early], out=product[:, first:])
            torch.mul(grad[:, :first], tail[:, before], out=product[:, :first])
            grads_weight.append(product.sum((0, 1)))
        return grad_x, grad_tail, torch.stack(grads_weight)


class LogDecay(nn.Module):
    """Compute how fast each key head forgets from the token: `log_decay = logsigmoid(W x + bias)`, at most 0.

    Biases start evenly between `longest`, a half-life of hundreds of tokens, and `shortest`, of a few. Local heads have
    the longest, and so has an only global head: one that forgets within a few tokens learns neither to copy from near
    by nor to recall.
    """

    def __init__(
        self, dim: int, *, key_heads: int, local: int = 0, shortest: float = 1.0, longest: float = 7.0
    ) -> None:
        super().__init__()
        self.local = local  # of the key heads, the last
        self.shortest = shortest
        self.longest = longest
        self.project = nn.Linear(dim, key_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, n, dim)` to `(b, g, n)`, in float32 or wider."""
        logits = rearrange(self.project(x), "b n g -> b g n")
        return F.logsigmoid(widen(logits))


class WriteStrength(nn.Module):
    """Compute from the token the share of its error that each key head writes: `beta = sigmoid(W x + bias)`.

    W starts at zero and the bias at `start`, so that no random number is drawn.
    """

    def __init__(self, dim: int, *, key_heads: int, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(key_heads, dim))
        self.bias = nn.Parameter(torch.full((key_heads,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, n, dim)` to `(b, g, n)`, in float32 or wider."""
        logits = rearrange(F.linear(x, self.weight, self.bias), "b n g -> b g n")
        return widen(logits).sigmoid()
