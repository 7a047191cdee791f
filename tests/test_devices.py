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
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from performer_lm import checkpoint
from performer_lm.attention.favor import FavorAttention
from performer_lm.generation.sampling import Sampler
from performer_lm.objectives import NextToken
from performer_lm.ops import precision
from performer_lm.training.task import Sums

ROOT = Path(__file__).parents[1]
KINDS = ("cuda", "mps", "xpu")
BACKENDS = sorted(path.stem for path in (ROOT / "configs" / "attn").glob("*.yaml"))
BY_FUNCTION = {"relu"}  # whose features get gradients from `torch.func`, which no dispatch mode lets into an operator
WORDS = {"delta": ["attn=delta", "attn/features=positive"]}  # as relu, its default, is of BY_FUNCTION
FEATURES = sorted(path.stem for path in (ROOT / "configs" / "attn" / "features").glob("*.yaml"))
MODELS = [
    *("model=performer_classic optimizer=adamw", "model=transformer attn=flash", "model=transformer attn=favor"),
    *("model=performer_seq2seq objective=seq2seq", "model=performer_encoder objective=mlm"),
    "model=performer_encoder objective=mlm attn/features=trig",
]
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


class OperationMode(TorchDispatchMode):
    """A mode that sees what operators of the package do, and not these alone."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        custom = OPDEFS.get(func._schema.name)
        if custom is None:
            return func(*args, **(kwargs or {}))
        with self, torch._C._AutoDispatchBelowAutograd():  # as it is called
            return custom._init_fn(*args, **(kwargs or {}))


class RefuseFloat64(OperationMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.run(func, args, kwargs)
        assert all(x.dtype != torch.float64 for x in tree_leaves(out) if isinstance(x, Tensor)), func
        return out


@pytest.mark.parametrize("attn", BACKENDS)
def test_where_float32_is_all_there_is_nothing_is_made_of_float64(
    attn: str, model_section: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint.build(model_section(*WORDS.get(attn, [f"attn={attn}"])))
    for name, module in list(sys.modules.items()):
        if name.startswith("performer_lm") and hasattr(module, "precise"):
            monkeypatch.setattr(module, "precise", lambda device: torch.float32)
    tokens = torch.arange(34).reshape(2, 17)
    with RefuseFloat64():
        nats = NextToken(chunk_size=None)(model, tokens, step=0, separator=None).nats
        sums = Sums.zero(tokens.device, counts=1)
        sums.add(nats, tokens.new_ones(()))
        if attn not in BY_FUNCTION:
            nats.sum().backward()
        assert math.isfinite(float(sums.nats))


class LookAtProducts(OperationMode):
    """Notes how precise products of float32 are while they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm"):
            self.seen.add(torch.get_float32_matmul_precision())
        return self.run(func, args, kwargs)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_linear_engine_multiplies_float32_in_full_whatever_the_rest_of_the_model_does(
    precision: str, model_section: Callable[..., dict[str, Any]]
) -> None:
    model = checkpoint.build(model_section("attn=favor", "attn.chunk_size=8"))
    [favor, *_] = [module for module in model.modules() if isinstance(module, FavorAttention)]
    q, k, v = torch.randn(3, 2, favor.heads, 33, favor.dim_head, requires_grad=True).unbind()
    log_decay = -torch.rand(2, favor.key_heads, 33)
    torch.set_float32_matmul_precision(precision)
    try:
        with LookAtProducts() as engine:
            favor(q, k, v, causal=True, log_decay=log_decay).sum().backward()
            state = favor.init_state(2, max_len=4, device=q.device, dtype=q.dtype)
            favor.extend(*(x[:, :, :1].detach() for x in (q, k, v)), state)
        with LookAtProducts() as head:
            model(torch.arange(20)[None]).sum().backward()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert engine.seen == {"highest"}
    assert head.seen == {"highest", precision}


class Repeats(OperationMode):
    """Refuses what torch refuses on CUDA under `use_deterministic_algorithms(True)`, of what a model might call."""

    refused = (
        "put_",
        "put",
        "histc",
        "bincount",
        "kthvalue",
        "median",
        "nll_loss2d",
        "scatter_reduce",
        "upsample",
        "grid",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        sums = name in ("cumsum", "cumsum_") and args[0].is_floating_point()
        assert not sums, f"{func} of floating point numbers"
        assert name.removesuffix("_backward") not in self.refused, func
        return self.run(func, args, kwargs)


@pytest.mark.parametrize("attn", BACKENDS)
def test_a_step_calls_nothing_that_cuda_refuses_where_steps_must_repeat(
    attn: str, model_section: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint.build(model_section(*WORDS.get(attn, [f"attn={attn}"])))
    monkeypatch.setattr(precision, "VARIES", {"cpu"})
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with Repeats():
        nats = NextToken(chunk_size=8)(model, torch.arange(34).reshape(2, 17), step=0, separator=None).nats
        if attn not in BY_FUNCTION:
            nats.sum().backward()
        Sampler(temperature=1.0, top_p=0.5)(torch.randn(2, 40), None)
        with torch.no_grad():
            _, state = model.start(torch.arange(8).reshape(2, 4))
            model.extend(torch.arange(2)[:, None], state)  # a decoding step, which has forms of its own


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
    jobs += [
        f"attn=favor attn/features={name} attn.num_features=null" for name in FEATURES if name != "trig"
    ]  # which has no order
    jobs += ["attn=exact model.key_heads=2", "model.dim_head=32", *MODELS]
    jobs = [f"{device} {job}" for device in ("cuda", "mps") for job in jobs]
    jobs = [
        job for job in jobs if not ("mps" in job and "flash" in job)
    ]  # torch's build for Apple alone knows the kernel
    for job, told in looks(tmp_path, *jobs).items():
        assert told["decoding"] == 0, job
        if job.removeprefix("cuda attn=").removeprefix("mps attn=") in SOFTMAX:
            assert told["training"] == 0, job
