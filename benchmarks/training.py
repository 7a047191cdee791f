"""Tokens a second of whole training steps: the default Performer against softmax, over the context.

    python benchmarks/training.py [cuda] [context ...]

Forward and backward of the default model (without the optimizer, which is the same for all) under `attn=favor` and
`attn=delta`, under `attn=flash` with the same convolution, decay and gate, and of the plain rotary transformer; in
float32, and in bfloat16 where the device multiplies that fast. All arms of a context are timed in turns within one
process, medians. Writes results/training.json and results/training.png, on CUDA training_cuda. About ten minutes on two
quiet cores.
"""

import sys
from functools import partial

import matplotlib.pyplot as plt
import torch
from measure import (
    RESULTS,
    THREADS,
    Run,
    named,
    peak_memory_on_cuda,
    take_device,
    time_together,
    write_results,
)
from steps import prepare

from performer_lm.ops.precision import multiplies_bfloat16

ARMS = {
    "favor": ["attn=favor"],
    "delta": ["attn=delta"],
    "flash, same extras": ["attn=flash"],
    "flash, plain rotary": ["model=transformer", "attn=flash"],
}
CONTEXTS = {"cpu": (512, 2048, 8192), "cuda": (512, 2048, 8192, 32768)}
TOKENS = {"cpu": 2048, "cuda": 32768}  # of a step, at least a window


def prepare_arm(context: int, overrides: list[str], dtype: torch.dtype, device: torch.device) -> Run:
    """Return the forward and backward of one batch."""
    sizes = [f"data.context={context}", f"data.batch_size={max(1, TOKENS[device.type] // context)}"]
    forward = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    return prepare(*overrides, *sizes, updates=False, forward=forward, device=device)


def measure(context: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Return the tokens a second of every arm and, on CUDA, the GiB that its step needs beside weights and batch."""
    runs = {name: prepare_arm(context, overrides, dtype, device) for name, overrides in ARMS.items()}
    seconds = time_together(runs, repeats=5 if context > 2048 else 9, device=device)
    peaks = {name: peak_memory_on_cuda(run) / 2**30 for name, run in runs.items()} if device.type == "cuda" else {}
    return {name: max(TOKENS[device.type], context) / each for name, each in seconds.items()}, peaks


def plot(results: dict[str, dict[int, dict[str, float]]], device: torch.device) -> None:
    """Draw tokens a second over the context."""
    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for panel, (dtype, found) in zip(panels[0], results.items(), strict=True):
        for name in ARMS:
            panel.plot(list(found), [found[context][name] for context in found], marker="o", label=name)
        panel.set(xscale="log", xlabel="context", ylabel="tokens a second", title=dtype, ylim=(0, None))
        panel.set_xticks(list(found), [str(context) for context in found])
        panel.grid(alpha=0.3)
        panel.legend()
    where = f"{THREADS} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    figure.suptitle(f"Forward and backward of the default model, {where}")
    figure.tight_layout()
    figure.savefig(RESULTS / f"{named('training', device)}.png", dpi=150)


def main() -> None:
    """Measure everything, print, write down and draw."""
    torch.set_num_threads(THREADS)
    device, words = take_device(sys.argv[1:])
    contexts = [int(word) for word in words] or list(CONTEXTS[device.type])
    rates: dict[str, dict[int, dict[str, float]]] = {}
    peaks: dict[str, dict[int, dict[str, float]]] = {}
    for dtype in (torch.float32, torch.bfloat16) if multiplies_bfloat16(device.type) else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        for context in contexts:
            found, held = measure(context, dtype, device)
            rates.setdefault(name, {})[context] = found
            if held:
                peaks.setdefault(name, {})[context] = held
            told = {arm: round(rate) for arm, rate in found.items()}
            print(name, context, told, {arm: round(peak, 2) for arm, peak in held.items()} or "", flush=True)
    write_results("training", {**rates, **({"GiB": peaks} if peaks else {})}, device=device)
    plot(rates, device)


if __name__ == "__main__":
    main()
