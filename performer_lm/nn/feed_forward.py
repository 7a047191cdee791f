"""The position-wise feed-forward layer."""

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from performer_lm.nn.branch import Body, TokenInfo
from performer_lm.ranges import Count, Share, ranged


def squared_relu(x: Tensor) -> Tensor:
    """Compute relu(x)^2 (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "squared_relu": squared_relu,
}


@ranged
class FeedForward(Body):
    """Widen, bend, narrow: `W_out f(W_in x)`, or `W_out (f(W_gate x) * W_in x)` when `gated` (arXiv 2002.05202).

    Gates of `sigmoid` give GLU, `gelu` GEGLU, `silu` SwiGLU.

    Args:
        dim: width of the stream.
        mult: the hidden width, over dim.
        activation: f, by name.
        gated: whether f gates a second projection.
        bias: whether the projections have biases.
        dropout: share of the hidden values dropped.
        chunks: pieces along the sequence, worked on one at a time. The hidden values of one piece alone exist at once,
            in training too, where the backward computes them anew.

    Raises:
        ValueError: for an unknown activation, or sizes below 1.
    """

    def __init__(
        self,
        dim: Count,
        *,
        mult: Annotated[float, Gt(0), Le(2**16)],
        activation: str,
        gated: bool = False,
        bias: bool = False,
        dropout: Share = 0.0,
        chunks: Count = 1,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"feed-forward activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        hidden = round(dim * mult)
        if hidden < 1:
            raise ValueError(f"feed-forward width dim x mult ({dim} x {mult}) must be at least 1")
        self.activation = ACTIVATIONS[activation]
        self.chunks = chunks
        self.project_in = nn.Linear(dim, hidden, bias=bias)
        self.gate = nn.Linear(dim, hidden, bias=bias) if gated else None
        self.project_out = nn.Linear(hidden, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, info: TokenInfo | None = None) -> Tensor:
        """Map `(b, n, dim)` to `(b, n, dim)`, each token alone."""
        if self.chunks == 1 or x.shape[1] == 1:
            return self._map(x)
        parts = x.chunk(self.chunks, dim=1)
        if not torch.is_grad_enabled():
            return torch.cat([self._map(part) for part in parts], dim=1)
        return torch.cat([checkpoint(self._map, part, use_reentrant=False) for part in parts], dim=1)

    def _map(self, x: Tensor) -> Tensor:
        hidden = self.project_in(x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        return self.project_out(self.dropout(hidden))
