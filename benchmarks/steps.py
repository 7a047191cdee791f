"""Training steps of configured models, for the benchmarks: forward, backward, clipping, update."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from measure import CPU, Run
from omegaconf import OmegaConf
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.objectives import NextToken
from performer_lm.training.optim import parameter_groups

CONFIGS = str(Path(__file__).parents[1] / "configs")
VOCABULARY = 2048


def prepare(
    *overrides: str,
    updates: bool = True,
    forward: Callable[[], AbstractContextManager[None]] = nullcontext,
    device: torch.device = CPU,
) -> Run:
    """Return a step of the model, optimizer and batch that `python train.py` would take with these overrides.

    Args:
        overrides: as for train.py.
        updates: whether the step updates the weights; else it is forward and backward alone.
        forward: a context such as autocast.
        device: where the model and the batch lie.
    """
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    section: Any = OmegaConf.to_container(cfg.model, resolve=True)
    torch.manual_seed(0)
    model = checkpoint.build({**section, "vocab_size": VOCABULARY}).to(device)
    optimizer = instantiate(cfg.optimizer)(parameter_groups(model, head=model.head)) if updates else None
    windows = torch.randint(0, VOCABULARY, (cfg.data.batch_size, cfg.data.context + 1)).to(device)
    return partial(step, model, optimizer, NextToken(chunk_size=None), windows, forward=forward)


def prepare_length(length: int, *overrides: str) -> Run:
    """Return the same at a context of `length`, as `measure.peak_memory` asks for it."""
    return prepare(*overrides, f"data.context={length}")


def step(
    model: Any,
    optimizer: torch.optim.Optimizer | None,
    objective: NextToken,
    windows: Tensor,
    *,
    forward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Take one step, the forward inside a context such as autocast; without an optimizer, up to the gradients."""
    with forward():
        loss = objective.mean(objective(model, windows, step=0))
    loss.backward()
    if optimizer is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.zero_grad(set_to_none=True)
