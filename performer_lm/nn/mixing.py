"""Cheap order and locality before attention: a token shift, a short causal convolution, decay that depends on the data.

With them, random-feature attention trains as well as softmax given the same; without them it does not.
Letters: `b` batch, `g` key heads, `n` tokens, `c` channels, `k` taps.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from performer_lm.ops.convolution import short_convolution
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


class LogDecay(nn.Module):
    """Compute how fast each key head forgets from the token: `log_decay = logsigmoid(W x + bias)`, at most 0.

    Biases run from `shortest` to `longest` over the heads, so half-lives start spread from a few tokens to hundreds.
    """

    def __init__(self, dim: int, *, key_heads: int, shortest: float = 1.0, longest: float = 7.0) -> None:
        super().__init__()
        self.shortest = shortest
        self.longest = longest
        self.project = nn.Linear(dim, key_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, n, dim)` to `(b, g, n)`, in float32 or wider."""
        logits = rearrange(self.project(x), "b n g -> b g n")
        return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


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
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
