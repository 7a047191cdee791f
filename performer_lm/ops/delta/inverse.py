"""The inverse of unit lower triangular matrices, many small ones at once.

A solver takes them one by one, which is slow where each is small. Here all of them go together: halves of halves are
inverted first, and joined by [[P, 0], [B, Q]]^-1 = [[P', 0], [-Q' B P', Q']], P' and Q' the inverses of P and Q.
"""

import torch
from torch import Tensor


def invert_unit_lower(lower: Tensor) -> Tensor:
    """Return (I + L)^-1 of strictly lower triangular L `(..., c, c)`.

    By log2 c rounds of matrix products, c^3 / 3 multiply-adds in all; as exact as substitution, since no power of L is
    taken.
    """
    *batch, c, _ = lower.shape
    size = 1 << (c - 1).bit_length()
    if size != c:
        lower = torch.nn.functional.pad(lower, (0, size - c, 0, size - c))
    found = torch.eye(size, dtype=lower.dtype, device=lower.device).expand(*batch, size, size).clone()
    half = 1
    while half < size:
        whole = 2 * half
        corner = _corners(lower, half, whole)
        first, second = _diagonal(found, 0, half, whole), _diagonal(found, half, half, whole)
        joined = -corner if half == 1 else -(second @ corner @ first)
        _corners(found, half, whole).copy_(joined)
        half = whole
    return found if size == c else found[..., :c, :c]


def _corners(x: Tensor, half: int, whole: int) -> Tensor:
    """View the lower left quarters of the blocks of `whole` on the diagonal: `(..., blocks, half, half)`."""
    return _blocks(x, half, 0, half, whole)


def _diagonal(x: Tensor, start: int, half: int, whole: int) -> Tensor:
    """View the upper left (`start` = 0) or lower right quarters of the blocks of `whole` on the diagonal."""
    return _blocks(x, start, start, half, whole)


def _blocks(x: Tensor, row: int, column: int, half: int, whole: int) -> Tensor:
    size, strides = x.shape[-1], x.stride()
    down, right = strides[-2], strides[-1]
    return x.as_strided(
        (*x.shape[:-2], size // whole, half, half),
        (*strides[:-2], whole * (down + right), down, right),
        x.storage_offset() + row * down + column * right,
    )
