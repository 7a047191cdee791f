"""In which precision sums are taken, and numbers near each other told apart."""

from contextlib import AbstractContextManager, ExitStack, nullcontext
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


def no_autocast(device: torch.device, *, ieee: bool = True) -> AbstractContextManager[object]:
    """Return a context that computes products in the dtype of what is multiplied: no autocast, no rounding on the way.

    That rounding (`ieee=False` leaves it) is what `torch.set_float32_matmul_precision` allows, for all products of a
    process. Compiled code cannot set it.
    """
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    rounds = ieee and not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() != "highest"
    if not casts and not rounds:
        return nullcontext()
    stack = ExitStack()
    if casts:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if rounds:
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
    return stack


def precise(device: torch.device) -> torch.dtype:
    """Return the dtype for sizes of logarithms, of which seven digits are too few before they cancel.

    Apple's GPUs have nothing wider than float32.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def high_low(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split float64 into two parts of `dtype`, so that differences of near numbers lose nothing."""
    high = wide.to(dtype)
    return high, (wide - high).to(dtype)


def multiplies_bfloat16(kind: str) -> bool:
    """Return True if the CPU or the accelerator has instructions for products of bfloat16; emulation costs too much."""
    if kind == "cpu":
        return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
