"""Memory that the blocks of a sequence use one after the other.

Features, scores and sums of a block are large, and live no longer than it: fresh memory for each would cost the host a
page fault every 4 KiB, which is slower than the arithmetic done in it.
"""

from math import prod

import torch
from torch import Tensor

from performer_lm.ops.precision import precise


class Scratch:
    """Tensors by name, each a view of memory that grows to the largest block and is then used again.

    A name's contents last until it is asked for again.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return memory of this shape with arbitrary contents."""
        size = prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return held[:size].view(shape)

    def take(self, name: str, x: Tensor) -> Tensor:
        """Return a copy of x."""
        return self(name, *x.shape).copy_(x)

    def triangle(self, size: int, *, of_logarithms: bool = False) -> Tensor:
        """Return a lower triangle of ones, `(size, size)`, to sum weights or logarithms by."""
        name = f"triangle of {size}{' of logarithms' if of_logarithms else ''}"
        if name not in self._held:
            dtype = precise(self._device) if of_logarithms else self._dtype
            self._held[name] = torch.ones(size, size, dtype=dtype, device=self._device).tril_()
        return self._held[name]
