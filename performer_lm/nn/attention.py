"""Multi-head attention around any backend: projections, convolution, positions, decay, gate, and its decoding state.

This is the only room that turns `(b, n, dim)` into `(b, h, n, d)` and back.
Letters: `b` batch, `n` tokens, `h` heads, `g` key heads, `d` head width, `c` channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from performer_lm.attention.base import AttentionFactory
from performer_lm.nn.mixing import LogDecay, ShortConvolution
from performer_lm.nn.norm import RMSNorm
from performer_lm.nn.positions import Positions


class LayerState(NamedTuple):
    """What one layer carries from token to token while decoding."""

    backend: Any
    tail: Tensor | None  # (b, k - 1, c): the convolution's last inputs
    length: Tensor  # (b,): tokens seen so far, pads not counted


class MultiHeadAttention(nn.Module):
    """Attention over `(b, n, dim)`, whose global heads run whatever backend `attn` builds.

    Args:
        dim: width of the stream.
        heads: query heads h.
        dim_head: width d of each head's queries, keys and values.
        key_heads: key and value heads g; divides h.
        attn: factory of the backend.
        layer: index of this layer, from 0.
        convolution: taps of the short causal convolution on q, k and v; 0 for none.
        decay: whether each key head fades by a data-dependent `log_decay`.
        gate: whether each head's output is RMS-normalised and passes a sigmoid gate.
        positions: factory of the position scheme.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        dim_head: int,
        key_heads: int,
        attn: AttentionFactory,
        layer: int,
        convolution: int,
        decay: bool,
        gate: bool,
        positions: Callable[..., Positions],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.key_heads = key_heads
        channels = (heads + 2 * key_heads) * dim_head
        self.project_in = nn.Linear(dim, channels, bias=False)
        self.convolution = ShortConvolution(channels, taps=convolution) if convolution else None
        self.positions = positions(dim_head=dim_head)
        self.decay = LogDecay(dim, key_heads=key_heads) if decay else None
        self.backend = attn(heads=heads, key_heads=key_heads, dim_head=dim_head, dim_value=dim_head, layer=layer)
        self.norm = RMSNorm(dim_head) if gate else None
        self.gate = nn.Linear(dim, heads * dim_head, bias=False) if gate else None
        self.project_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, *, causal: bool, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Attend over whole sequences `(b, n, dim)`; mask and segments are `(b, n)`."""
        tail = self._init_tail(x.shape[0], device=x.device, dtype=x.dtype)
        q, k, v, _ = self._project(x, tail, _positions(x, mask, segments), mask=mask, segments=segments)
        log_decay = None if self.decay is None else self.decay(x)
        out = self.backend(q, k, v, causal=causal, mask=mask, segments=segments, log_decay=log_decay)
        return self._finish(out, x)

    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Return the state of `batch` streams before any token."""
        backend = self.backend.init_state(batch, max_len=max_len, device=device, dtype=dtype)
        length = torch.zeros(batch, device=device, dtype=torch.int64)
        return LayerState(backend, self._init_tail(batch, device=device, dtype=dtype), length)

    def extend(self, x: Tensor, state: LayerState, *, mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """Append n tokens `(b, n, dim)` causally; `mask` `(b, n)` marks pads, which stand on the left."""
        positions = state.length[:, None] + _positions(x, mask, None)
        q, k, v, tail = self._project(x, state.tail, positions, mask=mask)
        log_decay = None if self.decay is None else self.decay(x)
        out, backend = self.backend.extend(q, k, v, state.backend, mask=mask, log_decay=log_decay)
        length = state.length + (x.shape[1] if mask is None else mask.sum(1))
        return self._finish(out, x), LayerState(backend, tail, length)

    def _init_tail(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        return None if self.convolution is None else self.convolution.init_tail(batch, device=device, dtype=dtype)

    def _project(
        self,
        x: Tensor,
        tail: Tensor | None,
        positions: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q `(b, h, n, d)`, k and v `(b, g, n, d)`, and the next convolution tail."""
        qkv = self.project_in(x)
        if self.convolution is not None:
            assert tail is not None
            qkv, tail = self.convolution(qkv, tail, mask=mask, segments=segments)
        heads = rearrange(qkv, "b n (h d) -> b h n d", h=self.heads + 2 * self.key_heads)
        q, k, v = heads.split((self.heads, self.key_heads, self.key_heads), dim=1)
        q, k = self.positions(q, k, positions)
        return q, k, v, tail

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        """Gate the heads' outputs `(b, h, n, d)` and bring them back to the stream `(b, n, dim)`."""
        if self.norm is not None and self.gate is not None:
            gate = rearrange(F.sigmoid(self.gate(x)), "b n (h d) -> b h n d", h=self.heads)
            out = self.norm(out) * gate
        return self.project_out(rearrange(out, "b h n d -> b n (h d)"))


def _positions(x: Tensor, mask: Tensor | None, segments: Tensor | None) -> Tensor:
    """Return each token's place `(b, n)` in its own document, counting real tokens only, from 0."""
    if mask is None:
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    else:
        places = mask.to(torch.int64).cumsum(1) - 1
    if segments is None:
        return places
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    first = places if mask is None else places + ~mask  # a document that opens with pads starts after them
    return places - torch.where(starts, first, 0).cummax(1).values
