"""Normalisation of the residual stream and of heads, with statistics in float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Scale the last axis to unit root mean square, then by a learned gain (arXiv 1910.07467)."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim)` to `(..., dim)` in x's dtype."""
        return F.rms_norm(_widen(x), self.gain.shape, self.gain, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Centre and scale the last axis, with learned gain and offset (arXiv 1607.06450)."""

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(dim))
        self.offset = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim)` to `(..., dim)` in x's dtype."""
        return F.layer_norm(_widen(x), self.gain.shape, self.gain, self.offset, self.eps).to(x.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
