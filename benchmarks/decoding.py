"""Milliseconds per decoded token of the default model, after a short and after a long context.

    python benchmarks/decoding.py [attn ...]

All contexts and backends are timed in turns within one process; medians. Writes results/decoding.json.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from performer_lm import checkpoint
from performer_lm.attention.base import fork
from performer_lm.model import PerformerLM
from performer_lm.performer import PerformerState

ROOT = Path(__file__).parents[1]
CONTEXTS = (256, 8192)
STEPS, ROUNDS = 16, 12


def build(attn: str) -> PerformerLM:
    """Return the default model with this backend, its weights untrained."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[f"attn={attn}"])
    section: Any = OmegaConf.to_container(cfg.model, resolve=True)
    model: PerformerLM = checkpoint.build({**section, "vocab_size": 2048})
    return model.eval()


@torch.inference_mode()
def main() -> None:
    """Prefill once per backend and context, then decode in turns."""
    names = sys.argv[1:] or ["favor", "flash", "local"]
    models = {name: build(name) for name in names}
    states: dict[tuple[str, int], PerformerState] = {}
    for name, model in models.items():
        for context in CONTEXTS:
            tokens = torch.randint(0, 2048, (1, context))
            state = model.init_state(1, max_len=context + STEPS)
            _, states[name, context] = model.extend(tokens, state, last_only=True)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in states}
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(ROUNDS):
        for (name, context), state in states.items():
            copy = fork(state)
            start = time.perf_counter()
            for _ in range(STEPS):
                _, copy = models[name].extend(token, copy)
            times[name, context].append(1000 * (time.perf_counter() - start) / STEPS)
    results = {}
    for name in names:
        short, long = (statistics.median(times[name, context]) for context in CONTEXTS)
        results[name] = {"ms_at_256": round(short, 3), "ms_at_8192": round(long, 3), "ratio": round(long / short, 3)}
        print(f"{name:8} {short:7.2f} ms at 256  {long:7.2f} ms at 8192  ratio {long / short:.2f}")
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / "decoding.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
