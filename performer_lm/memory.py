"""How much memory a run has needed, and what it was for where that was too much."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# of RuntimeErrors: torch's CPU allocator and some devices have no error type of their own
_ALLOCATION_FAILURES = (
    *("can't allocate memory", "not enough memory", "out of memory"),
    *("Storage size calculation overflowed", "integer multiplication overflow"),  # more than an address reaches
)
_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure: of several runs in one process, each has its own peak where the system can tell."""
    if device.type == "mps":
        return  # it keeps no peak
    if device.type != "cpu":
        torch.empty(0, device=device)  # a device has no statistics before its first tensor
        torch.accelerator.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # not everywhere allowed


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held: of the device's own memory, or, on a CPU, of the whole process.

    An Apple GPU tells only how much its driver has given: tensors, and what freed ones have left for others.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for a failed allocation, of the host's memory or a device's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION_FAILURES)


@contextmanager
def sizes_told(device: torch.device, **sizes: object) -> Iterator[None]:
    """Add to a failed allocation how large the work was, and how much memory was held."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = ", ".join(f"{name.replace('_', '-')} {size}" for name, size in sizes.items())
        error.add_note(f"{told}; at most {peak_memory(device) / 2**30:.2f} GiB were held on {device.type}")
        raise
