"""Milliseconds per decoded token of the default model, after a short and after a long context.

    python benchmarks/decoding.py [cuda] [attn ...]

All contexts and backends are timed in turns within one process; medians. Writes results/decoding.json, on CUDA
decoding_cuda.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from measure import take_device, write_results
from omegaconf import OmegaConf

from performer_lm import checkpoint
from performer_lm.attention.base import fork
from performer_lm.model import PerformerLM
from performer_lm.performer import PerformerState

ROOT = Path(__file__).parents[1]
CONTEXTS = {"cpu": (256, 8192), "cuda": (128, 2048, 65536)}
STEPS, ROUNDS = 16, 12


def build(attn: str, *, vocab_size: int = 2048) -> PerformerLM:
    """Return the default model with this backend, its weights untrained."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[f"attn={attn}"])
    section: Any = OmegaConf.to_container(cfg.model, resolve=True)
    model: PerformerLM = checkpoint.build({**section, "vocab_size": vocab_size})
    return model.eval()


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
    times: dict[tuple[str, int], list[float]] = {key: [] for key in states}
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for _ in range(ROUNDS):
        for (name, context), state in states.items():
            copy = fork(state)
            wait()
            start = time.perf_counter()
            for _ in range(STEPS):
                _, copy = models[name].extend(token, copy)
            wait()
            times[name, context].append(1000 * (time.perf_counter() - start) / STEPS)
    results = {}
    for name in names:
        found = {context: statistics.median(times[name, context]) for context in contexts}
        ratio = found[contexts[-1]] / found[contexts[0]]
        told = {f"ms_at_{context}": round(value, 3) for context, value in found.items()}
        results[name] = {**told, "ratio": round(ratio, 3)}
        listed = "  ".join(f"{value:7.2f} ms at {context}" for context, value in found.items())
        print(f"{name:8} {listed}  ratio {ratio:.2f}")
    write_results("decoding", results, device=device)


if __name__ == "__main__":
    main()
