"""Triton's kernels compile for GPUs that are not here: they fit their memory and registers, and use tensor cores.

Compiled ahead of time in a process of its own, as the interpreter of `test_triton.py` has taken over this one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""The bytes of shared memory that a program may have, by compute capability."""
SPILLED = 1024
"""The bytes of registers that may spill: two warps of `pull_queries` spill 872, and beat four, which spill none."""


def compile_kernels(capability: int, width: int, *names: str) -> dict[str, dict[str, object]]:
    """Return the shared bytes, spilled bytes and matrix instructions of each kernel."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), str(capability), str(width), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


def check(capability: int, width: int, *names: str) -> None:
    for name, found in compile_kernels(capability, width, *names).items():
        assert found["shared"] <= SHARED[capability], (name, found)  # type: ignore[operator]
        assert found["spilled"] <= SPILLED, (name, found)  # type: ignore[operator]
        assert found["matrix"] or name.startswith(("prepare", "pull_decay", "pull_division")), (name, found)


def test_a_kernel_compiles_for_hopper() -> None:
    check(90, 32, "outputs")


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_fit_every_gpu_and_width(capability: int, width: int) -> None:
    check(capability, width)
