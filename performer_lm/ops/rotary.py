"""Rotary position embedding (Su et al., arXiv 2104.09864), computed on the fly: no tables, no longest sequence.

Letters: `b` batch, `h` heads, `n` tokens, `d` head width, `w` rotated width (w <= d).
"""

import torch
from einops import rearrange
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, *, base: float = 10_000.0, width: int | None = None) -> Tensor:
    """Rotate the first `width` channels of every head by angles proportional to the token's position.

    Channel c of the first half is paired with channel c of the second half of the rotated width; pair c turns by
    `position * base ** (-2 c / width)` radians (RoFormer eq. 34, half layout).

    Args:
        x: `(b, h, n, d)`.
        positions: `(b, n)` or `(n,)`, any integer or float dtype.
        base: the longest wavelength is about `2 pi base` tokens.
        width: how many channels turn (all by default); must be even.

    Raises:
        ValueError: for an odd width, or one above d.
    """
    width = x.shape[-1] if width is None else width
    if width % 2 or width > x.shape[-1]:
        raise ValueError(f"rotary width ({width}) must be even and at most the head width ({x.shape[-1]})")
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, width, 2, device=x.device, dtype=dtype) / width
    angles = positions.to(dtype)[..., None] * base**-exponents
    angles = rearrange(angles, "... n w -> ... 1 n w")
    cos, sin = angles.cos(), angles.sin()
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned.to(dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, kept), dim=-1) if kept.shape[-1] else rotated
