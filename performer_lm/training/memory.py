"""The most memory a run has needed."""

import resource
import sys
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
