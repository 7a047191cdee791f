import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm.training.loggers.record import read_metrics


@pytest.mark.parametrize("parts", [2, 4])
def test_what_is_logged_is_the_whole_steps(start: Callable[..., Any], parts: int) -> None:
    for run, options in {"whole": [], "parts": [f"trainer.accumulate_grad_batches={parts}"]}.items():
        start("trainer.max_steps=3", "trainer.val_every=3", *options, f"run_dir=runs/{run}").fit()
    whole, split = (read_metrics(Path(f"runs/{run}/metrics.jsonl")) for run in ("whole", "parts"))
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/bpb"):
        expected = [(row["step"], row[name]) for row in whole if name in row]
        found = [(row["step"], row[name]) for row in split if name in row]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-4)


def test_steps_between_are_not_logged(start: Callable[..., Any]) -> None:
    start("trainer.max_steps=5", "trainer.log_every=2", "trainer.accumulate_grad_batches=2", "run_dir=runs/a").fit()
    rows = [row for row in read_metrics(Path("runs/a/metrics.jsonl")) if "train/loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert all("train/grad_norm" in row for row in rows)


class Clipped(Callback):
    """Keeps the norm of the gradients that an update is made with."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if gradients:
            self.norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))


@pytest.mark.parametrize("bound", [0.05, 1e9, None])
def test_gradients_are_scaled_down_to_the_bound_and_logged_as_they_were(
    start: Callable[..., Any], bound: float | None
) -> None:
    spelled = "null" if bound is None else bound
    run, kept = (
        start(f"trainer.gradient_clip_val={spelled}", "trainer.max_steps=5", "trainer.val_every=5", "run_dir=runs/a"),
        Clipped(),
    )
    run.trainer.callbacks.append(kept)
    run.fit()
    logged = [row["train/grad_norm"] for row in read_metrics(Path("runs/a/metrics.jsonl")) if "train/grad_norm" in row]
    assert len(kept.norms) == 4  # before each step but the first there are those of the one before
    assert kept.norms == pytest.approx([min(norm, bound or math.inf) for norm in logged[:4]], rel=1e-4)
    assert min(logged) > 0.05
