import json
from collections.abc import Callable
from pathlib import Path

import pytest

from performer_lm.training.callbacks import throughput
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run

Start = Callable[..., Run]


class Clock:
    """Passes a second whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("parts", [1, 2])
def test_it_counts_tokens_over_time_spent_training(start: Start, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(throughput, "time", Clock())
    common = ["trainer.max_steps=6", "trainer.log_every=2", "trainer.val_every=3"]
    run = start(*common, f"trainer.accumulate_grad_batches={parts}", "run_dir=runs/a")
    run.fit()
    rows = read_metrics(Path("runs/a/metrics.jsonl"))
    speeds = {row["step"]: row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row}
    # a second from start to log, one each from log to validation, and from validation to log
    assert speeds == {2: 2 * 256 / 1, 4: 2 * 256 / 2, 6: 2 * 256 / 1}
    assert "train/mfu" not in rows[0]
    assert json.loads(Path("runs/a/summary.json").read_text())["tokens_per_second"] > 0


def test_utilisation_is_the_share_of_the_peak(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device, *, precision: 1e12)
    run = start("run_dir=runs/a")
    run.fit()
    needed = 3 * run.task.model.count_flops(64) / 64
    for row in read_metrics(Path("runs/a/metrics.jsonl")):
        if "train/mfu" in row:
            assert row["train/mfu"] == pytest.approx(row["train/tokens_per_second"] * needed / 1e12, rel=1e-3)
    assert "MFU" in Path("runs/a/train.log").read_text()
