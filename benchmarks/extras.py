"""What convolution and decay add to a training step of the default model, at unchanged width.

    python benchmarks/extras.py

One process, two threads, the default model, batch and optimizer; the four variants are timed in turns, medians. Writes
results/extras.json. About two minutes on two quiet cores.
"""

import torch
from measure import THREADS, time_together, write_results
from steps import prepare

VARIANTS = {
    "neither": ["model.convolution=0", "model.decay=false"],
    "convolution": ["model.decay=false"],
    "decay": ["model.convolution=0"],
    "both": [],
}
ROUNDS = 15


def main() -> None:
    """Time the variants and write down what each adds."""
    torch.set_num_threads(THREADS)
    seconds = time_together({name: prepare(*overrides) for name, overrides in VARIANTS.items()}, repeats=ROUNDS)
    bare = seconds["neither"]
    shares = {name: value / seconds["both"] - bare / seconds["both"] for name, value in seconds.items()}
    for name, value in seconds.items():
        print(f"{name:12} {1000 * value:6.1f} ms a step, {shares[name]:5.1%} of the default one above neither")
    write_results("extras", {"seconds": seconds, "share_of_default_step": shares})


if __name__ == "__main__":
    main()
