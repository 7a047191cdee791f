"""Cheap order and locality before attention: a short causal convolution, and decay that depends on the data.

With them, random-feature attention trains as well as softmax given the same; without them it does not.
Letters: `b` batch, `g` key heads, `n` tokens, `c` channels, `k` taps.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class ShortConvolution(nn.Module):
    """Mix each channel with its own last `taps` values, then apply SiLU: depthwise, causal, zero before the start.

    Written as shifted products, which on these shapes beat the grouped `conv1d` kernels of every platform we tried.
    """

    def __init__(self, channels: int, *, taps: int) -> None:
        super().__init__()
        if taps < 1:
            raise ValueError(f"a convolution needs at least 1 tap, got {taps}")
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(taps, channels))  # weight[s] multiplies the value s tokens ago

    def init_tail(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the zeros `(b, k - 1, c)` that stand before the first token."""
        return torch.zeros(batch, self.taps - 1, self.weight.shape[1], device=device, dtype=dtype)

    def forward(
        self, x: Tensor, tail: Tensor, *, mask: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map `(b, n, c)` and the last `k - 1` inputs before it to `(b, n, c)` and the tail that the next call needs.

        Args:
            x: `(b, n, c)`.
            tail: `(b, k - 1, c)`, the inputs just before x.
            mask: `(b, n)` bool; tokens marked False count as zeros.
            segments: `(b, n)` document ids; nothing crosses from one document to the next.
        """
        n = x.shape[1]
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
        stream = torch.cat((tail.to(x.dtype), x), dim=1)
        weight = self.weight.to(x.dtype)
        mixed = x * weight[0]
        for shift in range(1, self.taps):
            start = self.taps - 1 - shift
            past = stream[:, start : start + n]
            if segments is not None:
                past = past * _same_document(segments, shift)[..., None].to(x.dtype)
            mixed = torch.addcmul(mixed, past, weight[shift])
        return F.silu(mixed), stream[:, n:]


def _same_document(segments: Tensor, shift: int) -> Tensor:
    """Mark the tokens `(b, n)` whose neighbour `shift` tokens ago exists in the row and belongs to their document."""
    before = F.pad(segments, (shift, 0), value=-1)[:, : segments.shape[1]]
    return before == segments


class LogDecay(nn.Module):
    """Let each key head forget at a rate that the token decides: `log_decay = logsigmoid(W x + bias)`, at most 0.

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
