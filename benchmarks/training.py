"""Tokens a second of whole training steps: the default Performer against softmax, over the context.

    python benchmarks/training.py [context ...]

Forward and backward of the default model (without the optimizer, which is the same for all) under `attn=favor`, under
`attn=flash` with the same convolution, decay and gate, and of the plain rotary transformer; in float32, and in bfloat16
where the CPU multiplies that fast. All arms of a context are timed in turns within one process, medians. Writes
results/training.json and results/training.png. About ten minutes on two quiet cores.
"""

import sys
from functools import partial

import matplotlib.pyplot as plt
import torch
from measure import RESULTS, THREADS, Run, time_together, write_results
from steps import prepare

from performer_lm.training.trainer import multiplies_bfloat16

ARMS = {
    "favor": ["attn=favor"],
    "flash, same extras": ["attn=flash"],
    "flash, plain rotary": ["model=transformer", "attn=flash"],
}
CONTEXTS = (512, 2048, 8192)
TOKENS = 2048  # of a step, at least a window


def prepare_arm(context: int, overrides: list[str], dtype: torch.dtype) -> Run:
    """Return the forward and backward of one batch."""
    sizes = [f"data.context={context}", f"data.batch_size={max(1, TOKENS // context)}"]
    forward = partial(torch.autocast, "cpu", dtype=dtype, enabled=dtype != torch.float32)
    return prepare(*overrides, *sizes, updates=False, forward=forward)


def measure(context: int, dtype: torch.dtype) -> dict[str, float]:
    """Return the tokens a second of every arm."""
    runs = {name: prepare_arm(context, overrides, dtype) for name, overrides in ARMS.items()}
    seconds = time_together(runs, repeats=5 if context > 2048 else 9)
    return {name: max(TOKENS, context) / each for name, each in seconds.items()}


def plot(results: dict[str, dict[int, dict[str, float]]]) -> None:
    """Draw tokens a second over the context."""
    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for panel, (dtype, found) in zip(panels[0], results.items(), strict=True):
        for name in ARMS:
            panel.plot(list(found), [found[context][name] for context in found], marker="o", label=name)
        panel.set(xscale="log", xlabel="context", ylabel="tokens a second", title=dtype, ylim=(0, None))
        panel.set_xticks(list(found), [str(context) for context in found])
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"Forward and backward of the default model, {THREADS} threads")
    figure.tight_layout()
    figure.savefig(RESULTS / "training.png", dpi=150)


def main() -> None:
    """Measure everything, print, write down and draw."""
    torch.set_num_threads(THREADS)
    contexts = [int(word) for word in sys.argv[1:]] or list(CONTEXTS)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for dtype in (torch.float32, torch.bfloat16) if multiplies_bfloat16("cpu") else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        for context in contexts:
            found = results.setdefault(name, {})[context] = measure(context, dtype)
            print(name, context, {arm: round(rate) for arm, rate in found.items()}, flush=True)
    write_results("training", results)
    plot(results)


if __name__ == "__main__":
    main()
