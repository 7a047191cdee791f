"""What convolution and decay add to a training step of the default model, at unchanged width.

    python benchmarks/extras.py

One process, two threads, the default model, batch and optimizer; the four variants are timed in turns, medians. Writes
results/extras.json. About two minutes on two quiet cores.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from measure import THREADS, Run, time_together, write_results
from omegaconf import OmegaConf

from performer_lm import checkpoint
from performer_lm.objectives import NextToken
from performer_lm.training.optim import parameter_groups

CONFIGS = str(Path(__file__).parents[1] / "configs")
VARIANTS = {
    "neither": ["model.convolution=0", "model.decay=false"],
    "convolution": ["model.decay=false"],
    "decay": ["model.convolution=0"],
    "both": [],
}
VOCABULARY, ROUNDS = 2048, 15


def prepare(*overrides: str) -> Run:
    """Return a training step: forward, backward, clipping, update."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    section: Any = OmegaConf.to_container(cfg.model, resolve=True)
    torch.manual_seed(0)
    model = checkpoint.build({**section, "vocab_size": VOCABULARY})
    optimizer = instantiate(cfg.optimizer)(parameter_groups(model, head=model.head))
    objective = NextToken(chunk_size=None)
    windows = torch.randint(0, VOCABULARY, (cfg.data.batch_size, cfg.data.context + 1))
    return partial(step, model, optimizer, objective, windows)


def step(model: Any, optimizer: torch.optim.Optimizer, objective: NextToken, windows: torch.Tensor) -> None:
    """Take one step."""
    objective.mean(objective(model, windows, step=0)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


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
