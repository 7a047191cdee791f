"""Integer hashes: random bits as a pure function of counters, on any device, without a generator.

Dropout is drawn from them. Any block of its mask can be computed on its own, so exact, chunked and tiled attention drop
the same probabilities under the same seed, forward and backward, whatever their blocks.
"""

from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, Tensor)
_WORD = (1 << 64) - 1


def mix(number: Number) -> Number:
    """Hash the low 32 bits of integers, Python's or int64, to 32 bits (lowbias32: xor-shift and multiply, twice)."""
    low = number & 0xFFFFFFFF
    low = ((low ^ (low >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    low = ((low ^ (low >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return low ^ (low >> 16)


def mix32_(bits: Tensor) -> Tensor:
    """Do the same in place in int32, whose shift copies the sign bit and whose products wrap."""
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= 0x7FEB352D
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= 0x846CA68B - 2**32
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def _scramble(word: int) -> int:
    """Scramble 64 bits one to one (the splitmix64 finalizer: Steele, Lea, Flood 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def mix_seed(*parts: int) -> int:
    """Hash integers into one 64-bit seed; order matters, and neighbouring parts give unrelated seeds."""
    word = 0
    for part in parts:
        word = _scramble(word ^ _scramble(part & _WORD))
    return word


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
    per_seed = mix(mix(seed ^ 0x6A09E667) ^ (seed >> 32))
    per_row = mix(mix(stream ^ 0xBB67AE85) ^ per_seed) ^ mix(row ^ 0x3C6EF372)
    per_col = mix(col ^ 0xA54FF53A)
    # int32 halves the traffic of the only part that has i * j elements.
    bits = mix32_(mix(per_row).int() ^ per_col.int())
    return bits.bitwise_and_(0x7FFFFFFF) >= round(rate * 2**31)
