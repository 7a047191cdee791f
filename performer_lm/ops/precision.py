"""In which precision sums are taken, and numbers near each other told apart."""

from contextlib import AbstractContextManager, nullcontext
from math import log

import torch
from torch import Tensor

LOG2_E = 1.0 / log(2.0)
"""Logarithms are kept in units of log 2 where many are taken: exp2 is several times as fast as exp."""


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which sums over `tensors` are taken: their widest, and float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which autocast leaves products in the dtype of their factors."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def precise(device: torch.device) -> torch.dtype:
    """Return the dtype for sizes of logarithms, of which seven digits are too few before they cancel.

    Apple's GPUs have nothing wider than float32.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def high_low(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split float64 into two parts of `dtype`, so that differences of near numbers lose nothing."""
    high = wide.to(dtype)
    return high, (wide - high).to(dtype)
