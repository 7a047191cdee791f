"""Running sums that come out alike every time, bit for bit, where the user asks for that.

Letters: `n` numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from performer_lm.ops.precision import precise

BLOCK = 256  # numbers added up by one product with a triangle of ones


def running_sum(x: Tensor) -> Tensor:
    """Return `x.cumsum(-1)` of floating point numbers `(..., n)`.

    CUDA's own adds up in an order that varies, and is refused under `torch.use_deterministic_algorithms(True)`: there,
    sums are matrix products.
    """
    return _sum_in_blocks(x.to(precise(x.device))).to(x.dtype) if _must_repeat(x) else x.cumsum(-1)


def _must_repeat(x: Tensor) -> bool:
    return x.is_cuda and torch.are_deterministic_algorithms_enabled()


def _sum_in_blocks(x: Tensor) -> Tensor:
    length = x.shape[-1]
    if length <= BLOCK:
        return x @ x.new_ones(length, length).triu()
    inside = _sum_in_blocks(F.pad(x, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK)))
    totals = inside[..., -1]
    return (inside + (_sum_in_blocks(totals) - totals)[..., None]).flatten(-2)[..., :length]
