"""A training step against performer-pytorch: the same model, the same batch, each in a process of its own.

    pip install -e '.[bench]'
    python benchmarks/peer.py

dim 256, depth 4, 4 heads of 64, 266 features, 1024 tokens of a vocabulary of 256, one sequence (more need more memory
there than most machines have), causal, AdamW. Ours is the model that `interop/performer_pytorch.py` makes of the same
arguments. The processes take turns, a step each; medians of tokens per second, and the peak memory of a step over
parameters and optimizer state. Writes results/peer.json. About two minutes on two quiet cores.
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


def build_theirs() -> nn.Module:
    """Build performer-pytorch's language model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from performer_pytorch import PerformerLM

        return PerformerLM(**ARGUMENTS)


def build_ours() -> nn.Module:
    """Build ours from the same arguments."""
    model: nn.Module = checkpoint.build(describe_language_model(**ARGUMENTS))
    return model


MODELS = {"performer-pytorch": build_theirs, "performer-lm": build_ours}


def serve(build: Callable[[], nn.Module], pipe: Connection) -> None:
    """Take a step for every message, and answer with its seconds and its peak memory in bytes."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH + 1))
    step(model, optimizer, tokens[:, :65])  # libraries and optimizer state are not the step's
    while pipe.recv():
        Path("/proc/self/clear_refs").write_text("5")
        before, start = status("VmRSS"), time.perf_counter()
        step(model, optimizer, tokens)
        pipe.send((time.perf_counter() - start, status("VmHWM") - before))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    """Train on one sequence."""
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Let both processes take their steps in turns."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, build in MODELS.items():
        pipes[name], there = context.Pipe()
        context.Process(target=serve, args=(build, there), daemon=True).start()
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in MODELS}
    for _ in range(STEPS):
        for name, pipe in pipes.items():
            pipe.send(True)
            found[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    rows = {
        name: {
            "tokens_per_second": LENGTH / statistics.median(seconds for seconds, _ in steps),
            "peak_MiB": max(peak for _, peak in steps) / 2**20,
        }
        for name, steps in found.items()
    }
    theirs, ours = rows.values()
    ratios = {
        "faster": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "less_memory": theirs["peak_MiB"] / ours["peak_MiB"],
    }
    for name, row in rows.items():
        print(f"{name:18} {row['tokens_per_second']:7.0f} tokens/s, {row['peak_MiB']:6.0f} MiB")
    print(f"{ratios['faster']:.1f} times faster, in {ratios['less_memory']:.1f} times less memory")
    write_results("peer", {"shape": ARGUMENTS, "models": rows, **ratios})


if __name__ == "__main__":
    main()
