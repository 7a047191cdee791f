import ast
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from performer_lm import checkpoint
from performer_lm.objectives import NextToken
from performer_lm.training.task import Sums

ROOT = Path(__file__).parents[1]
KINDS = ("cuda", "mps", "xpu")
BACKENDS = sorted(path.stem for path in (ROOT / "configs" / "attn").glob("*.yaml"))
SOFTMAX = {"chunked", "exact", "flash", "flash_tiled", "local"}  # which never look at a number


def test_what_the_package_asks_of_a_device_module_is_there() -> None:
    """An attribute of `torch.get_device_module(...)` must be there for every kind of accelerator."""
    asked: set[tuple[str, str]] = set()
    for path in (ROOT / "performer_lm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                if re.fullmatch(r"torch\.(cuda|mps|xpu|accelerator)", owner):
                    asked.add((owner.removeprefix("torch."), node.attr))
                if owner.startswith("torch.get_device_module("):
                    asked.update((kind, node.attr) for kind in KINDS)
    assert ("mps", "get_rng_state") in asked
    assert [name for name in sorted(asked) if not hasattr(getattr(torch, name[0]), name[1])] == []


class RefuseFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert all(x.dtype != torch.float64 for x in tree_leaves(out) if isinstance(x, Tensor)), func
        return out


@pytest.mark.parametrize("attn", BACKENDS)
def test_where_float32_is_all_there_is_nothing_is_made_of_float64(
    attn: str, model_section: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint.build(model_section(f"attn={attn}"))
    for name, module in list(sys.modules.items()):
        if name.startswith("performer_lm") and hasattr(module, "precise"):
            monkeypatch.setattr(module, "precise", lambda device: torch.float32)
    tokens = torch.arange(34).reshape(2, 17)
    with RefuseFloat64():
        nats = NextToken(chunk_size=None)(model, tokens, step=0, separator=None).nats
        sums = Sums.zero(tokens.device, counts=1)
        sums.add(nats, tokens.new_ones(()))
        nats.sum().backward()
        assert math.isfinite(float(sums.nats))


def looks(folder: Path, *jobs: str) -> dict[str, dict[str, int]]:
    """Return by job (a device and overrides) how often the host looks at a number of the device."""
    words = [sys.executable, str(ROOT / "tests" / "fake_devices.py"), str(folder / "fake_devices.so"), *jobs]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(jobs)
    for job, told in zip(jobs, found, strict=True):
        assert "error" not in told, f"{job}: {told['error']}"
    return dict(zip(jobs, found, strict=True))


def test_a_model_trains_and_decodes_on_cuda_without_waiting_for_it(tmp_path: Path) -> None:
    assert looks(tmp_path, "cuda attn=flash") == {"cuda attn=flash": {"training": 0, "decoding": 0}}


@pytest.mark.slow
def test_every_backend_trains_and_decodes_on_every_accelerator(tmp_path: Path) -> None:
    jobs = [f"attn={name}" for name in BACKENDS]
    jobs += ["model=performer_classic optimizer=adamw", "attn/features=optimal", "attn=flash model.key_heads=2"]
    for job, told in looks(tmp_path, *(f"{device} {job}" for device in ("cuda", "mps") for job in jobs)).items():
        assert told["decoding"] == 0, job
        if job.removeprefix("cuda attn=").removeprefix("mps attn=") in SOFTMAX:
            assert told["training"] == 0, job
