"""Rotary position embedding (Su et al., arXiv 2104.09864), computed on the fly: no tables, no longest sequence.

Letters: `b` batch, `h` heads, `n` tokens, `d` head width, `w` rotated width (w <= d).
"""

import torch
from einops import rearrange
from torch import Tensor


def rotate(
    x: Tensor, positions: Tensor, *, base: float = 10_000.0, width: int | None = None, interleaved: bool = False
) -> Tensor:
    """Rotate the first `width` channels of every head by angles proportional to the token's position.

    Pair c of channels turns by `position * base ** (-2 c / width)` radians (RoFormer eq. 34).

    Args:
        x: `(b, h, n, d)`.
        positions: `(b, n)` or `(n,)`, any integer or float dtype.
        base: the longest wavelength is about `2 pi base` tokens.
        width: how many channels turn (all by default); must be even.
        interleaved: pair c is channels 2c and 2c + 1; else (half layout) channels c and c + width / 2.

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
    pairs = "b h n (w two) -> two b h n w" if interleaved else "b h n (two w) -> two b h n w"
    first, second = rearrange(turned.to(dtype), pairs, two=2)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin))
    turned = rearrange(rotated, " -> ".join(reversed(pairs.split(" -> "))), two=2).to(x.dtype)
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned
