"""Time calls against each other, and measure what memory a call needs, for the softmax benchmarks.

Linux only: peak memory is the high-water mark of the process (`/proc`), which sees every allocation, kernels' own
included. On CUDA it is what torch's allocator gave out.
"""

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
THREADS = 2
CPU = torch.device("cpu")
WARM_UP_LENGTH = 256

Run = Callable[[], None]


def take_device(words: list[str]) -> tuple[torch.device, list[str]]:
    """Return the device to measure on, CUDA if a word of the command line says so, and the other words."""
    return torch.device("cuda" if "cuda" in words else "cpu"), [word for word in words if word != "cuda"]


def time_together(
    runs: dict[str, Run], *, repeats: int, warm_up: bool = True, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Return the median seconds of each run, taken in turns so that a busy machine is busy for all of them.

    A run ends when `device` has done all that it was given.
    """
    wait = torch.get_device_module(device).synchronize
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    if warm_up:
        for run in runs.values():
            run()
    for _ in range(repeats):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(make: Callable[..., Run], length: int, *args: Any) -> int:
    """Return the bytes that the run `make(length, *args)` needs over its inputs, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_here, make, length, *args).result()


def peak_memory_on_cuda(run: Run) -> int:
    """Return the bytes that a run needs over what is held before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_here(make: Callable[..., Run], length: int, *args: Any) -> int:
    torch.set_num_threads(THREADS)
    make(WARM_UP_LENGTH, *args)()  # libraries, threads and their buffers are not the call's
    run = make(length, *args)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def status(field: str) -> int:
    """Return a figure of this process in bytes, by its name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the facts a reader needs to compare the numbers with their own."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device), "cpu": cpu, **versions}
    return {"cpu": cpu, "threads": THREADS, **versions}


def write_results(name: str, results: dict[str, Any], *, device: torch.device = CPU) -> None:
    """Write `results/<name>.json`, or `results/<name>_cuda.json`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": describe_machine(device), **results}, indent=2) + "\n"
    (RESULTS / f"{named(name, device)}.json").write_text(text)


def named(name: str, device: torch.device) -> str:
    """Return the name of a file of results, which says on which kind of device they were measured."""
    return name if device.type == "cpu" else f"{name}_{device.type}"
