from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
