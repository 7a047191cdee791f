"""Measure FAVOR attention against the platform's flash kernel, performer-pytorch, the machine, and itself at length.

    python benchmarks/attention.py [cuda]

About ten minutes on two quiet cores. Writes results/attention.json and results/attention.png, and prints the tables.
With `cuda`, writes results/attention_cuda.json: forward and backward in bfloat16 against the flash kernel.
`pip install -e '.[bench]'` adds the peer; without it that row is left out, and said to be.
"""

import math
import statistics
import sys
import time
import warnings
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import torch
from measure import (
    CPU,
    RESULTS,
    THREADS,
    Run,
    peak_memory,
    peak_memory_on_cuda,
    take_device,
    time_together,
    write_results,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.feature_maps import SoftmaxFeatures

HEADS = 8
LARGE, SMALL = {"d": 64, "m": 266}, {"d": 32, "m": 64}
LENGTHS = [1024, 2048, 4096, 8192, 16384]
CUDA_SHAPE, CUDA_LENGTHS = {"batch": 8, "heads": 16, "d": 64, "m": 128}, [2048, 16384, 65536]
LONG_LENGTHS = [4096, 8192, 16384, 32768, 65536]
FLOPS_PER_TOKEN = 178_000  # per head at d = 64, m = 266 and tiles of 64, whatever the chunk


def build(d: int, m: int, *, heads: int = HEADS) -> FavorAttention:
    """Build FAVOR+ attention."""
    features = partial(SoftmaxFeatures, coupling="orthogonal", regularized=False, antithetic=False, learned=False)
    return FavorAttention(
        heads=heads,
        key_heads=heads,
        dim_head=d,
        dim_value=d,
        layer=0,
        features=partial(features, centred=False, momentum=None),
        num_features=m,
        seed=0,
        redraw_interval=None,
        redraw_until=None,
        chunk_size=None,
    )


def draw(length: int, d: int, *, grad: bool) -> list[Tensor]:
    """Draw q, k, v, the same every time."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, d, generator=random).requires_grad_(grad) for _ in range(3)]


def train(length: int, name: str, d: int, m: int) -> Run:
    """Return a run of the forward and the backward pass, causal."""
    inputs, weight = draw(length, d, grad=True), torch.ones(1, HEADS, length, d)
    if name == "favor":
        attend = partial(build(d, m), causal=True)
    elif name == "performer-pytorch":
        attend = build_peer(d, m)
    else:
        attend = partial(scaled_dot_product_attention, is_causal=True)

    def run() -> None:
        attend(*inputs).backward(weight)
        for x in inputs:
            x.grad = None

    return run


def train_on_cuda(length: int, name: str, *, batch: int, heads: int, d: int, m: int) -> Run:
    """Return a run of the forward and the backward pass in bfloat16, causal."""
    options: Any = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = [torch.randn(batch, heads, length, d, **options).requires_grad_() for _ in range(3)]
    weight = torch.randn(batch, heads, length, d, **options)
    favor = partial(build(d, m, heads=heads).cuda(), causal=True)
    attend: Any = favor if name == "favor" else partial(scaled_dot_product_attention, is_causal=True)

    def run() -> None:
        torch.autograd.grad(attend(*inputs), inputs, weight)

    return run


def compare_on_cuda() -> list[dict[str, Any]]:
    """Time and weigh forward and backward against the flash kernel."""
    rows = []
    for length in CUDA_LENGTHS:
        runs = {name: train_on_cuda(length, name, **CUDA_SHAPE) for name in ("SDPA", "favor")}
        seconds = time_together(runs, repeats=5 if length > 8192 else 20, device="cuda")
        peaks = {name: peak_memory_on_cuda(run) / 2**30 for name, run in runs.items()}
        speedup = seconds["SDPA"] / seconds["favor"]
        rows.append({**CUDA_SHAPE, "length": length, "seconds": seconds, "speedup": speedup, "GiB": peaks})
        print(
            f"n={length:6} forward + backward: SDPA {1e3 * seconds['SDPA']:8.2f} ms, {peaks['SDPA']:5.2f} GiB, "
            f"favor {1e3 * seconds['favor']:8.2f} ms, {peaks['favor']:5.2f} GiB, {speedup:.2f}x",
            flush=True,
        )
    return rows


def build_peer(d: int, m: int) -> Any:
    """Build performer-pytorch's causal attention, which on a CPU takes its own fallback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from performer_pytorch import FastAttention

        return FastAttention(dim_heads=d, nb_features=m, causal=True)


def compare_with_flash() -> list[dict[str, Any]]:
    """Time forward and backward against the flash kernel."""
    rows = []
    for shape in (LARGE, SMALL):
        for length in LENGTHS:
            runs = {name: train(length, name, **shape) for name in ("SDPA", "favor")}
            seconds = time_together(runs, repeats=3 if length > 8192 else 7)
            rows.append({**shape, "length": length, "seconds": seconds, "speedup": seconds["SDPA"] / seconds["favor"]})
            print(
                f"d={shape['d']} m={shape['m']:3} n={length:6} forward + backward: SDPA {seconds['SDPA']:7.3f} s, "
                f"favor {seconds['favor']:7.3f} s, {rows[-1]['speedup']:.2f}x",
                flush=True,
            )
    return rows


def compare_with_peer(length: int = 1024) -> dict[str, Any]:
    """Time and weigh performer-pytorch's causal path."""
    names = ("performer-pytorch", "favor")
    try:
        seconds = time_together({name: train(length, name, **LARGE) for name in names}, repeats=5)
    except ImportError:
        print("performer-pytorch is not installed: its row is left out", flush=True)
        return {}
    peaks = {name: peak_memory(train, length, name, *LARGE.values()) for name in names}
    found = {
        "seconds": seconds,
        "MiB": {name: peak / 2**20 for name, peak in peaks.items()},
        "speedup": seconds[names[0]] / seconds["favor"],
        "less_memory": peaks[names[0]] / peaks["favor"],
    }
    print(
        f"n={length} against performer-pytorch: {found['speedup']:.1f}x faster, {found['less_memory']:.1f}x less memory"
    )
    return found


def measure_growth() -> dict[str, Any]:
    """Fit the exponent of time in length, and weigh the longest run over its inputs, outputs and gradients."""
    seconds = {}
    for length in LONG_LENGTHS:
        seconds[length] = time_together({"favor": train(length, "favor", **LARGE)}, repeats=3)["favor"]
    logs = [(math.log(length), math.log(value)) for length, value in seconds.items()]
    exponent = statistics.linear_regression(*zip(*logs, strict=True)).slope
    longest = LONG_LENGTHS[-1]
    tensor = 4 * HEADS * longest * LARGE["d"]
    over = peak_memory(train, longest, "favor", *LARGE.values()) - 4 * tensor  # the output and three gradients
    print(
        f"n={LONG_LENGTHS[0]} to {longest}: time grows as n^{exponent:.3f}, {over / 1e9:.2f} GB over inputs and outputs"
    )
    return {"seconds": seconds, "exponent": exponent, "GB_over_inputs_outputs_gradients": over / 1e9}


def measure_throughput(length: int = 16384) -> dict[str, float]:
    """Compare the forward pass with the machine's own rate of matrix products."""
    one, other = torch.randn(2, 4096, 4096)
    inputs, attention = draw(length, LARGE["d"], grad=False), build(**LARGE)

    def forward() -> None:
        with torch.no_grad():
            attention(*inputs, causal=True)

    seconds = time_together({"matmul": lambda: torch.mm(one, other), "favor": forward}, repeats=7)
    rates = {"matmul": 2 * 4096**3 / seconds["matmul"], "favor": FLOPS_PER_TOKEN * HEADS * length / seconds["favor"]}
    share = rates["favor"] / rates["matmul"]
    print(f"n={length} forward: {rates['favor'] / 1e9:.0f} GFLOP/s, {share:.0%} of {rates['matmul'] / 1e9:.0f}")
    return {"GFLOPs": rates["favor"] / 1e9, "matmul_GFLOPs": rates["matmul"] / 1e9, "share": share}


def measure_decoding(contexts: tuple[int, ...] = (0, 1024, 16384)) -> dict[int, float]:
    """Time one decoding step after a context, in microseconds."""
    found = {}
    attention = build(**LARGE)
    with torch.inference_mode():
        for context in contexts:
            state = attention.init_state(1, max_len=1, device=CPU, dtype=torch.float32)
            if context:
                _, state = attention.extend(*draw(context, LARGE["d"], grad=False), state)
            token, seconds = draw(1, LARGE["d"], grad=False), []
            for _ in range(2000):
                start = time.perf_counter()
                _, state = attention.extend(*token, state)
                seconds.append(time.perf_counter() - start)
            found[context] = statistics.median(seconds) * 1e6
            print(f"one decoding step after {context:6} tokens: {found[context]:.0f} us", flush=True)
    return found


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw seconds over length into results/attention.png."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, shape in zip(panels, (LARGE, SMALL), strict=True):
        for name in ("SDPA", "favor"):
            points = [(row["length"], row["seconds"][name]) for row in rows if row["d"] == shape["d"]]
            panel.loglog(*zip(*points, strict=True), marker="o", label=name)
        panel.set(xlabel="tokens", title=f"d = {shape['d']}, m = {shape['m']}")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="seconds, forward + backward")
    panels[0].legend()
    figure.suptitle(f"Causal attention, {HEADS} heads, {THREADS} threads")
    figure.tight_layout()
    figure.savefig(RESULTS / "attention.png", dpi=150)


def main() -> None:
    """Measure everything, write it down, draw it."""
    device, _ = take_device(sys.argv[1:])
    if device.type == "cuda":
        return write_results("attention", {"flash": compare_on_cuda()}, device=device)
    torch.set_num_threads(THREADS)
    results = {
        "throughput": measure_throughput(),
        "decoding_microseconds": measure_decoding(),
        "flash": compare_with_flash(),
        "peer": compare_with_peer(),
        "growth": measure_growth(),
    }
    write_results("attention", results)
    plot(results["flash"])


if __name__ == "__main__":
    main()
