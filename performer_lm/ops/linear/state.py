"""Linear attention's state: all that it keeps of the keys it has seen, of one size whatever their number.

Letters: `b` batch, `g` key heads, `n` tokens, `m` features, `e` value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.maps import precise

EMPTY = -(2.0**100)
"""The exponent of nothing: so low that any key outweighs it, yet finite, so that differences stay numbers."""


class LinearState(NamedTuple):
    """The sums of phi(k) [v, 1] over 2^exponent, per feature."""

    sums: Tensor  # (b, g, m, e + 1)
    exponent: Tensor  # (b, g, m), float64: integers near log2 of the sum of the keys' features


def empty_state(
    batch: int, key_heads: int, num_features: int, dim_value: int, *, device: torch.device, dtype: torch.dtype
) -> LinearState:
    """Return the state of no keys, with sums in float32 unless `dtype` is wider."""
    dtype = torch.promote_types(dtype, torch.float32)
    sums = torch.zeros(batch, key_heads, num_features, dim_value + 1, device=device, dtype=dtype)
    return LinearState(sums, torch.full_like(sums[..., 0], EMPTY, dtype=precise(device)))


class Geometry(NamedTuple):
    """How a sequence is cut: results depend on it by rounding only."""

    chunk: int
    """Tokens that see each other through a matrix of weights."""
    block: int
    """Tokens worked on at once: whole chunks. One state per block is kept for the backward."""


def choose_geometry(state: LinearState, *, block: int | None) -> Geometry:
    """Cut a sequence for a device: what caches hold on a CPU, as much as memory holds elsewhere.

    Args:
        state: whose device counts, and how many features a token has in it.
        block: tokens per block where the caller wants another number.
    """
    b, g, m, _ = state.sums.shape
    features = CACHED if state.sums.device.type == "cpu" else HELD
    most = 512 if state.sums.device.type == "cpu" else 1 << 20
    fitting = 1 << (max(1, features // max(1, b * g * m)).bit_length() - 1)
    block = block or min(max(CHUNK, fitting), most)
    return Geometry(min(CHUNK, block), block - block % min(CHUNK, block))


CHUNK = 64
CACHED = 1 << 19
"""Features (of all tokens, heads and sequences) of a block on a CPU: with gradients beside them, what caches hold."""
HELD = 1 << 27
"""The same on an accelerator: half a GiB in float32."""
