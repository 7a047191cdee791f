import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.training.callbacks import limits
from performer_lm.training.callbacks.limits import TimeLimit, early_stopping, time_limit
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run

Start = Callable[..., Run]


class Clock:
    """Passes a minute whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 60.0
        return self.now


def test_a_limited_run_ends_saved_and_goes_on_exactly(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["trainer.max_steps=8", "trainer.val_every=8", "trainer.accumulate_grad_batches=2"]
    start(*common, "run_dir=runs/whole").fit()
    with monkeypatch.context() as patched:
        patched.setattr(limits, "time", Clock())
        start(*common, "callbacks.time_limit.minutes=3", "run_dir=runs/part").fit()
    assert json.loads(Path("runs/part/summary.json").read_text())["steps"] == 3
    saved = checkpoint.read(Path("runs/part/checkpoints/last.ckpt"))
    assert saved.content["global_step"] == 3
    assert "the time limit of 3 minutes is reached" in Path("runs/part/train.log").read_text()
    assert [row["step"] for row in read_metrics(Path("runs/part/metrics.jsonl")) if "val/bpb" in row] == [3]
    start(*common, "ckpt=runs/part").fit()
    whole, part = (checkpoint.read(Path(f"runs/{name}/checkpoints/last.ckpt")).weights for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_a_run_that_gets_no_better_ends(start: Start) -> None:
    options = ["callbacks.early_stopping.patience=2", "callbacks.early_stopping.min_delta=100"]
    start(*options, "trainer.max_steps=20", "trainer.val_every=2", "run_dir=runs/a").fit()
    assert json.loads(Path("runs/a/summary.json").read_text())["steps"] == 6
    assert [row["step"] for row in read_metrics(Path("runs/a/metrics.jsonl")) if "val/bpb" in row] == [2, 4, 6]


def test_null_is_off_and_nonsense_is_refused() -> None:
    assert time_limit(minutes=None) is None
    assert early_stopping(patience=None, min_delta=0.0) is None
    with pytest.raises(ValueError, match="minutes must be above 0, got 0"):
        TimeLimit(minutes=0)
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        early_stopping(patience=0, min_delta=0.0)
