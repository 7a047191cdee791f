"""Measure time and memory of every form of softmax attention against each other.

    python benchmarks/softmax.py

About five minutes on two cores. Writes results/softmax.json and results/softmax.png, and prints the tables.
"""

from collections.abc import Callable
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from measure import RESULTS, THREADS, Run, peak_memory, time_together, write_results
from torch import Tensor

from performer_lm.ops import chunked_attention, exact_attention, tiled_attention

FORMS: dict[str, Callable[..., Tensor]] = {
    "exact": exact_attention,
    "chunked": chunked_attention,
    "flash_tiled": tiled_attention,
    "SDPA": F.scaled_dot_product_attention,
}
WIDTH = 64
LENGTHS = [2**power for power in range(6, 17)]
LONGEST_EXACT = 2**14  # beyond it the matrix alone is 4 GiB
MEMORY_LENGTH, TRAIN_LENGTH, CAUSAL_LENGTH, HEADS = 16384, 4096, 8192, 8


def draw(heads: int, length: int, *, grad: bool) -> list[Tensor]:
    """Draw q, k, v, the same every time."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, WIDTH, generator=random).requires_grad_(grad) for _ in range(3)]


def forward(length: int, name: str, heads: int = 1, causal: bool = False) -> Run:
    """Return a run of the forward pass."""
    inputs = draw(heads, length, grad=False)
    attend = partial(FORMS[name], is_causal=causal) if name == "SDPA" else partial(FORMS[name], causal=causal)

    def run() -> None:
        attend(*inputs)

    return run


def train(length: int, name: str, heads: int = 1, causal: bool = False) -> Run:
    """Return a run of the forward and the backward pass."""
    inputs = draw(heads, length, grad=True)
    attend = partial(FORMS[name], is_causal=causal) if name == "SDPA" else partial(FORMS[name], causal=causal)

    def run() -> None:
        attend(*inputs).sum().backward()
        for x in inputs:
            x.grad = None

    return run


def measure_memory() -> list[dict[str, object]]:
    """Measure one head against its score matrix, which backward doubles."""
    rows: list[dict[str, object]] = []
    for passes, make, matrices in (("forward", forward, 1), ("forward + backward", train, 2)):
        matrix = matrices * MEMORY_LENGTH**2 * 4
        for name in FORMS:
            peak = peak_memory(make, MEMORY_LENGTH, name)
            rows.append({"passes": passes, "form": name, "MiB": peak / 2**20, "below_matrix": matrix / peak})
            print(
                f"{passes:20} {name:12} {peak / 2**20:9.1f} MiB  {matrix / peak:7.1f}x below the score matrix",
                flush=True,
            )
    return rows


def measure_training() -> dict[str, float]:
    """Time forward and backward of eight heads, not causal."""
    seconds = time_together({name: train(TRAIN_LENGTH, name, HEADS) for name in FORMS}, repeats=5)
    for name, value in seconds.items():
        label = f"n={TRAIN_LENGTH} h={HEADS} forward + backward {name:12}"
        print(f"{label} {value:7.3f} s  {value / seconds['exact']:.2f} of exact", flush=True)
    return seconds


def measure_causal() -> list[dict[str, object]]:
    """Time what skipping the future saves."""
    rows: list[dict[str, object]] = []
    for heads in (1, HEADS):
        for passes, make in (("forward", forward), ("forward + backward", train)):
            runs = {str(causal): make(CAUSAL_LENGTH, "chunked", heads, causal) for causal in (False, True)}
            seconds = time_together(runs, repeats=5)
            ratio = seconds["True"] / seconds["False"]
            rows.append({"heads": heads, "passes": passes, "seconds": seconds["True"], "of_full": ratio})
            print(f"n={CAUSAL_LENGTH} h={heads} causal chunked {passes:20} {ratio:.2f} of not causal", flush=True)
    return rows


def measure_lengths() -> list[dict[str, object]]:
    """Time the forward pass of one head over all lengths."""
    rows: list[dict[str, object]] = []
    for length in LENGTHS:
        runs = {name: forward(length, name) for name in FORMS if name != "exact" or length <= LONGEST_EXACT}
        seconds = time_together(runs, repeats=1 if length > LONGEST_EXACT else 5, warm_up=length <= LONGEST_EXACT)
        rows.append({"length": length, "seconds": seconds})
        print(
            f"n={length:6} " + "  ".join(f"{name} {value * 1e3:.2f} ms" for name, value in seconds.items()), flush=True
        )
    return rows


def plot(lengths: list[dict[str, object]]) -> None:
    """Draw seconds over length into results/softmax.png."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in FORMS:
        points = [(row["length"], row["seconds"][name]) for row in lengths if name in row["seconds"]]
        axes.loglog(*zip(*points, strict=True), marker="o", label=name, base=2)
    axes.set(xlabel="tokens", ylabel="seconds", title="Softmax attention, one head, d = 64, forward", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "softmax.png", dpi=150)


def main() -> None:
    """Measure everything, write it down, draw it."""
    torch.set_num_threads(THREADS)
    results = {
        "training_seconds": measure_training(),
        "causal": measure_causal(),
        "lengths": measure_lengths(),
        "memory": measure_memory(),
    }
    write_results("softmax", results)
    plot(results["lengths"])


if __name__ == "__main__":
    main()
