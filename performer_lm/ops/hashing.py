"""Integer hashes: random bits as a pure function of counters, on any device, without a generator."""

from typing import TypeVar

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
