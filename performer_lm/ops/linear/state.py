"""Linear attention's state, which is all that it keeps of the keys it has seen; how a sequence is cut for a device, and
the memory that its blocks share.

Letters: `b` batch, `g` key heads, `m` features, `e` value width.
"""

from dataclasses import dataclass, field
from math import log2, prod
from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.precision import precise

EMPTY = -(2.0**100)
"""The exponent of nothing: so low that any key outweighs it, yet finite, so that differences stay numbers."""


class LinearState(NamedTuple):
    """The sums of phi(k) [v, 1] over 2^exponent, per feature."""

    sums: Tensor  # (b, g, m, e + 1)
    exponent: Tensor  # (b, g, m), float64


def empty_state(
    batch: int, key_heads: int, num_features: int, dim_value: int, *, device: torch.device, dtype: torch.dtype
) -> LinearState:
    """Return the state of no keys, with sums in float32 unless `dtype` is wider."""
    dtype = torch.promote_types(dtype, torch.float32)
    sums = torch.zeros(batch, key_heads, num_features, dim_value + 1, device=device, dtype=dtype)
    return LinearState(sums, torch.full_like(sums[..., 0], EMPTY, dtype=precise(device)))


class Geometry(NamedTuple):
    """How a sequence is cut; results depend on it by rounding only."""

    tile: int
    """Tokens that see each other through a matrix of weights."""
    block: int
    """Tokens worked on at once, in whole tiles. For a backward, one state per block is kept."""
    one_scale: bool
    """Whether the tiles of a block share a scale, and join the sums in place; else each has its own, and all join at
    once."""
    triton: bool = False
    """Whether Triton's kernels do all of it, in tiles of their own."""


def choose_geometry(sums: Tensor, *, block: int | None) -> Geometry:
    """Cut a sequence for a device: as caches like it on a CPU, in as few and as large operations as may be elsewhere.

    Args:
        sums: `(b, g, m, ...)`; their device counts, and how many features a token has in them.
        block: tokens per block where the caller wants another number.
    """
    b, g, m = sums.shape[:3]
    b = 1 if torch.compiler.is_exporting() else b  # a program that is exported serves batches of any size
    on_host = sums.device.type == "cpu"
    if block is None:
        fitting = (CACHED if on_host else HELD) / max(1, b * g * m)
        block = 2 ** round(min(max(log2(fitting), 6), 9 if on_host else 20))
    tile = min(CPU_TILE if on_host else TILE, block)
    return Geometry(tile, block - block % tile, on_host)


CPU_TILE, TILE = 32, 64
"""More tokens cost arithmetic, fewer cost passes over the sums."""
CACHED = 1 << 19
"""Features (of all tokens, heads and sequences) of a block on a CPU: with their gradients, about what caches hold."""
HELD = 1 << 27
"""The same on an accelerator: half a GiB in float32."""


@dataclass
class Scratch:
    """Memory that the blocks of a sequence use one after the other: tensors by name, which grow to the largest block.

    Features, scores and sums of a block are large, and live no longer than it: fresh memory for each would cost the
    host a page fault every 4 KiB, which is slower than the arithmetic done in it. A name's contents last until it is
    asked for again.
    """

    dtype: torch.dtype
    device: torch.device
    _held: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return memory of this shape with arbitrary contents."""
        size = prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return held[:size].view(shape)

    def take(self, name: str, x: Tensor) -> Tensor:
        """Return a copy of x."""
        return self(name, *x.shape).copy_(x)

    def triangle(self, size: int, *, of_logarithms: bool = False) -> Tensor:
        """Return a lower triangle of ones, `(size, size)`, to sum weights or logarithms by."""
        name = f"triangle of {size}{' of logarithms' if of_logarithms else ''}"
        if name not in self._held:
            dtype = precise(self.device) if of_logarithms else self.dtype
            self._held[name] = torch.ones(size, size, dtype=dtype, device=self.device).tril_()
        return self._held[name]
