"""How sums are taken: in which precision, and alike every time, bit for bit, where the user asks for that."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = 1.0 / log(2.0)
"""Logarithms are kept in units of log 2 where many are taken: exp2 is several times as fast as exp."""
VARIES = frozenset({"cuda"})  # devices whose own running sums add up in an order that varies
BLOCK = 256  # numbers of a running sum added up by one product with a triangle of ones


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which sums over `tensors` are taken: their widest, and float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def widen(x: Tensor) -> Tensor:
    """Return x in the dtype in which its sums are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(device: torch.device, *, ieee: bool = True) -> AbstractContextManager[object]:
    """Return a context that computes products in the dtype of what is multiplied: no autocast, no rounding on the way.

    That rounding (`ieee=False` leaves it) is what `torch.set_float32_matmul_precision` allows, for all products of a
    process. Compiled code cannot set it.
    """
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    rounds = ieee and not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() != "highest"
    return _in_full(device, casts=casts, rounds=rounds) if casts or rounds else nullcontext()  # decoding asks often


@contextmanager
def _in_full(device: torch.device, *, casts: bool, rounds: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if casts:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if rounds:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def precise(device: torch.device) -> torch.dtype:
    """Return the dtype for sizes of logarithms, of which seven digits are too few before they cancel.

    Apple's GPUs have nothing wider than float32.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def high_low(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split float64 into two parts of `dtype`, so that differences of near numbers lose nothing."""
    high = wide.to(dtype)
    return high, (wide - high).to(dtype)


def running_sum(x: Tensor) -> Tensor:
    """Return `x.cumsum(-1)` of floating point numbers `(..., n)`.

    CUDA's own is refused under `torch.use_deterministic_algorithms(True)`: there, sums are matrix products.
    """
    if x.device.type in VARIES and torch.are_deterministic_algorithms_enabled():
        return _sum_in_blocks(x.to(precise(x.device))).to(x.dtype)
    return x.cumsum(-1)


def _sum_in_blocks(x: Tensor) -> Tensor:
    length = x.shape[-1]
    if length <= BLOCK:
        return x @ x.new_ones(length, length).triu()
    inside = _sum_in_blocks(F.pad(x, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK)))
    totals = inside[..., -1]
    return (inside + (_sum_in_blocks(totals) - totals)[..., None]).flatten(-2)[..., :length]


def multiplies_bfloat16(kind: str) -> bool:
    """Return True if the CPU or the accelerator has instructions for products of bfloat16; emulation costs too much."""
    if kind == "cpu":
        return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
