"""What reversible and recomputed layers save, and what they cost.

    python benchmarks/reversible.py

The default model and batch at two depths: seconds per training step, timed in turns in one process, and the peak memory
of a step over parameters and optimizer state, each in a process of its own. Writes results/reversible.json. About five
minutes on two quiet cores.
"""

from typing import Any

import torch
from measure import THREADS, peak_memory, time_together, write_results
from steps import prepare, prepare_length

KINDS = {"plain": [], "recomputed": ["model.recompute=true"], "reversible": ["model.reversible=true"]}
DEPTHS, CONTEXT, ROUNDS = (4, 12), 512, 7


def main() -> None:
    """Time and weigh each kind at each depth."""
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    for depth in DEPTHS:
        sized = {name: [*options, f"model.depth={depth}"] for name, options in KINDS.items()}
        seconds = time_together({name: prepare(*options) for name, options in sized.items()}, repeats=ROUNDS)
        for name, options in sized.items():
            peak = peak_memory(prepare_length, CONTEXT, *options) / 2**20
            rows.append({"depth": depth, "kind": name, "seconds": seconds[name], "MiB": peak})
            slower = seconds[name] / seconds["plain"]
            print(
                f"depth {depth:2} {name:10} {seconds[name]:6.3f} s a step ({slower:.2f}x), {peak:6.0f} MiB", flush=True
            )
    write_results("reversible", {"context": CONTEXT, "rows": rows})


if __name__ == "__main__":
    main()
