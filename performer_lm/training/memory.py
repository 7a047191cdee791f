"""How much memory a run has needed, and what it was for where that was too much."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure: of several runs in one process, each has its own peak where the system can tell."""
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    elif _STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # not everywhere allowed


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held: of the device's own memory, or, on a CPU, of the whole process."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def sizes_told(device: torch.device, **sizes: object) -> Iterator[None]:
    """Add to an error that may be one of memory how large the work was, and how much memory was held."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = ", ".join(f"{name.replace('_', '-')} {size}" for name, size in sizes.items())
        error.add_note(f"{told}; at most {peak_memory(device) / 2**30:.2f} GiB were held on {device.type}")
        raise
