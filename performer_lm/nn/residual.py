"""How a layer's two parts join the residual stream."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from performer_lm.nn.attention import LayerState, MultiHeadAttention


class PreNormBlock(nn.Module):
    """One layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))` (arXiv 2002.04745).

    Args:
        dim: width of the stream.
        norm: factory called with dim.
        feed_forward: factory called with dim.
        attention: the layer's attention.
        dropout: share of each part's output dropped before it joins the stream.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm: Callable[..., nn.Module],
        feed_forward: Callable[..., nn.Module],
        attention: MultiHeadAttention,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(dim)
        self.attention = attention
        self.feed_forward_norm = norm(dim)
        self.feed_forward = feed_forward(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, causal: bool, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Map whole sequences `(b, n, dim)` to `(b, n, dim)`."""
        attended = self.attention(self.attention_norm(x), causal=causal, mask=mask, segments=segments)
        return self._feed_forward(x + self.dropout(attended))

    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Return the state of `batch` streams before any token."""
        return self.attention.init_state(batch, max_len=max_len, device=device, dtype=dtype)

    def extend(self, x: Tensor, state: LayerState, *, mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """Append n tokens `(b, n, dim)` causally."""
        attended, state = self.attention.extend(self.attention_norm(x), state, mask=mask)
        return self._feed_forward(x + self.dropout(attended)), state

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
