"""A training step against performer-pytorch: the same model, the same batch, each in a process of its own.

    pip install -e '.[bench]'
    python benchmarks/peer.py

dim 256, depth 4, 4 heads of 64, 266 features, 1024 tokens of a vocabulary of 256, one sequence (more need more memory
there than most machines have), causal, AdamW. Ours is the model that `interop/performer_pytorch.py` makes of the same
arguments. Both in float32, and both under autocast to bfloat16. The processes take turns, a step each; medians of
tokens per second, and the peak memory of a step over parameters and optimizer state. Writes results/peer.json. About
three minutes on two quiet cores.
"""

import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measure import THREADS, status, write_results
from torch import Tensor, nn
from torch.nn import functional as F

from performer_lm import checkpoint
from performer_lm.interop.performer_pytorch import describe_language_model

LENGTH, VOCABULARY, STEPS = 1024, 256, 9
ARGUMENTS: dict[str, Any] = {
    "num_tokens": VOCABULARY,
    "max_seq_len": LENGTH,
    "dim": 256,
    "depth": 4,
    "heads": 4,
    "dim_head": 64,
    "causal": True,
}


def build_theirs(**other: Any) -> nn.Module:
    """Build performer-pytorch's language model, some of its arguments other than ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from performer_pytorch import PerformerLM

        return PerformerLM(**{**ARGUMENTS, **other})


def build_ours() -> nn.Module:
    """Build ours from the same arguments."""
    model: nn.Module = checkpoint.build(describe_language_model(**ARGUMENTS))
    return model


MODELS = {"performer-pytorch": build_theirs, "performer-lm": build_ours}
PRECISIONS = ("float32", "bfloat16")


def serve(build: Callable[[], nn.Module], precision: str, pipe: Connection) -> None:
    """Take a step for every message, and answer with its seconds and its peak memory in bytes."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH + 1))
    step(model, optimizer, tokens[:, :65], precision)  # libraries and optimizer state are not the step's
    while pipe.recv():
        Path("/proc/self/clear_refs").write_text("5")
        before, start = status("VmRSS"), time.perf_counter()
        step(model, optimizer, tokens, precision)
        pipe.send((time.perf_counter() - start, status("VmHWM") - before))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, precision: str) -> None:
    """Train on one sequence."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(tokens[:, :-1])
    F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Let the processes take their steps in turns."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for precision in PRECISIONS:
        for name, build in MODELS.items():
            pipes[name, precision], there = context.Pipe()
            context.Process(target=serve, args=(build, precision, there), daemon=True).start()
    found: dict[tuple[str, str], list[tuple[float, int]]] = {which: [] for which in pipes}
    for _ in range(STEPS):
        for which, pipe in pipes.items():
            pipe.send(True)
            found[which].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    results = {precision: compare(*(found[name, precision] for name in MODELS)) for precision in PRECISIONS}
    write_results("peer", {"shape": ARGUMENTS, **results})


def compare(theirs: list[tuple[float, int]], ours: list[tuple[float, int]]) -> dict[str, Any]:
    """Print and return medians and ratios."""
    rows = {
        name: {
            "tokens_per_second": LENGTH / statistics.median(seconds for seconds, _ in steps),
            "peak_MiB": max(peak for _, peak in steps) / 2**20,
        }
        for name, steps in zip(MODELS, (theirs, ours), strict=True)
    }
    for name, row in rows.items():
        print(f"{name:18} {row['tokens_per_second']:7.0f} tokens/s, {row['peak_MiB']:6.0f} MiB")
    other, own = rows.values()
    faster = own["tokens_per_second"] / other["tokens_per_second"]
    less = other["peak_MiB"] / own["peak_MiB"]
    print(f"{faster:.1f} times faster, in {less:.1f} times less memory")
    return {"models": rows, "faster": faster, "less_memory": less}


if __name__ == "__main__":
    main()
