"""Milliseconds per decoded token of the default model, after a short and after a long context.

On CUDA, of the model's own step and, where the state does not grow, of the captured one.

    python benchmarks/decoding.py [cuda] [attn ...]

All contexts and backends are timed in turns within one process; medians. Writes results/decoding.json, on CUDA
decoding_cuda.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from measure import take_device, write_results
from omegaconf import OmegaConf
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.attention.base import fork
from performer_lm.generation.captured import PATIENCE, Steps
from performer_lm.model import PerformerLM
from performer_lm.performer import PerformerState

ROOT = Path(__file__).parents[1]
CONTEXTS = {"cpu": (256, 8192), "cuda": (128, 2048, 65536)}
STEPS, ROUNDS = 16, 12
Step = Callable[[Tensor, PerformerState], tuple[Tensor, PerformerState]]


def build(attn: str, *, vocab_size: int = 2048) -> PerformerLM:
    """Return the default model with this backend, its weights untrained."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[f"attn={attn}"])
    section: Any = OmegaConf.to_container(cfg.model, resolve=True)
    model: PerformerLM = checkpoint.build({**section, "vocab_size": vocab_size})
    return model.eval()


def list_steps(models: dict[str, PerformerLM], states: dict[str, PerformerState], ids: Tensor) -> dict[str, Step]:
    """Return what is timed: the step of each model, and its captured step where there is one."""
    steps: dict[str, Step] = {}
    for name, model in models.items():
        steps[name] = partial(step_of, model)
        captured, state = Steps(model), fork(states[name])
        for _ in range(PATIENCE + 2):
            _, state = captured.extend(ids, state)
        if captured.is_captured:
            steps[f"{name} captured"] = captured.extend
    return steps


def step_of(model: PerformerLM, ids: Tensor, state: PerformerState) -> tuple[Tensor, PerformerState]:
    """Append ids `(b,)` by the model itself."""
    logits, state = model.extend(ids[:, None], state)
    return logits[:, -1], state


@torch.inference_mode()
def main() -> None:
    """Prefill once per backend and context, then decode in turns."""
    device, words = take_device(sys.argv[1:])
    names = words or ["favor", "flash", "local"]
    contexts, wait = CONTEXTS[device.type], torch.get_device_module(device).synchronize
    models = {name: build(name).to(device) for name in names}
    states: dict[tuple[str, int], PerformerState] = {}
    for name, model in models.items():
        for context in contexts:
            tokens = torch.randint(0, 2048, (1, context), device=device)
            state = model.init_state(1, max_len=context + STEPS)
            _, states[name, context] = model.extend(tokens, state, last_only=True)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    steps = list_steps(models, {name: states[name, contexts[0]] for name in names}, ids)
    times: dict[tuple[str, int], list[float]] = {(label, context): [] for label in steps for context in contexts}
    for _ in range(ROUNDS):
        for (label, context), found in times.items():
            copy = fork(states[label.split()[0], context])
            wait()
            start = time.perf_counter()
            for _ in range(STEPS):
                _, copy = steps[label](ids, copy)
            wait()
            found.append(1000 * (time.perf_counter() - start) / STEPS)
    results = {}
    for label in steps:
        medians = {context: statistics.median(times[label, context]) for context in contexts}
        ratio = medians[contexts[-1]] / medians[contexts[0]]
        told = {f"ms_at_{context}": round(value, 3) for context, value in medians.items()}
        results[label] = {**told, "ratio": round(ratio, 3)}
        listed = "  ".join(f"{value:7.2f} ms at {context}" for context, value in medians.items())
        print(f"{label:16} {listed}  ratio {ratio:.2f}")
    write_results("decoding", results, device=device)


if __name__ == "__main__":
    main()
