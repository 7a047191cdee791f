"""Dropout as a counter hash: whether a probability is kept is a pure function of (seed, b, h, i, j).

Any block of the mask can be computed on its own, so exact, chunked and tiled attention drop the same probabilities
under the same seed, forward and backward, whatever their blocks; and the global generator is never touched.

Letters: `b` batch, `h` heads, `i` queries, `j` keys.
"""

from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, Tensor)


def keep_mask(
    seed: int, rate: float, batch: int, heads: int, rows: range, cols: range, *, device: torch.device
) -> Tensor:
    """Return True where a probability is kept: `(batch, heads, rows, cols)`, each with chance `1 - rate`.

    `rows` and `cols` are the places of the block in the whole i x j matrix.
    """
    stream = torch.arange(batch * heads, device=device).reshape(batch, heads, 1, 1)
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    col = torch.arange(cols.start, cols.stop, device=device)
    # Each counter is hashed under a key of its own, so that no two of them can stand in for each other.
    per_seed = _mix(_mix(seed ^ 0x6A09E667) ^ (seed >> 32))
    per_row = _mix(_mix(stream ^ 0xBB67AE85) ^ per_seed) ^ _mix(row ^ 0x3C6EF372)
    per_col = _mix(col ^ 0xA54FF53A)
    # int32 halves the traffic of the only part that has i * j elements.
    bits = _mix32(_mix(per_row).int() ^ per_col.int())
    return bits.bitwise_and_(0x7FFFFFFF) >= round(rate * 2**31)


def check_dropout(rate: float, seed: int | None) -> None:
    """Raise ValueError unless `rate` is in [0, 1) and a positive rate comes with a seed."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {rate}")
    if rate > 0.0 and seed is None:
        raise ValueError(f"dropout ({rate}) needs a seed: it is a function of (seed, b, h, i, j)")


def _mix(number: Number) -> Number:
    """Hash the low 32 bits of integers, Python's or int64, to 32 bits (lowbias32: xor-shift and multiply, twice)."""
    low = number & 0xFFFFFFFF
    low = ((low ^ (low >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    low = ((low ^ (low >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return low ^ (low >> 16)


def _mix32(bits: Tensor) -> Tensor:
    """Do the same in place in int32, whose shift copies the sign bit and whose products wrap."""
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= 0x7FEB352D
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= 0x846CA68B - 2**32
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits
