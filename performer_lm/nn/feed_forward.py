"""The position-wise feed-forward layer."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


def squared_relu(x: Tensor) -> Tensor:
    """Compute relu(x)^2 (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}


class FeedForward(nn.Module):
    """Widen, bend, narrow: `W_out f(W_in x)`, or `W_out (f(W_gate x) * W_in x)` when `gated` (arXiv 2002.05202)."""

    def __init__(self, dim: int, *, mult: float, activation: str, gated: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"feed-forward activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        hidden = round(dim * mult)
        if hidden < 1:
            raise ValueError(f"feed-forward width dim x mult ({dim} x {mult}) must be at least 1")
        self.activation = ACTIVATIONS[activation]
        self.project_in = nn.Linear(dim, hidden, bias=False)
        self.gate = nn.Linear(dim, hidden, bias=False) if gated else None
        self.project_out = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, n, dim)` to `(b, n, dim)`, each token alone."""
        hidden = self.project_in(x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        return self.project_out(self.dropout(hidden))
