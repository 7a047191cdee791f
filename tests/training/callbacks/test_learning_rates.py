from collections.abc import Callable
from pathlib import Path

import pytest

from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run
from performer_lm.training.schedule import cosine


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_rates_logged_are_those_of_the_updates(start: Callable[..., Run], optimizer: str) -> None:
    start(f"optimizer={optimizer}", "optimizer.lr=0.01", "trainer.accumulate_grad_batches=2", "run_dir=runs/a").fit()
    share = cosine(4, warmup=0.1, final=0.1)
    rows = [row for row in read_metrics(Path("runs/a/metrics.jsonl")) if "train/lr" in row]
    assert [row["train/lr"] for row in rows] == pytest.approx([0.01 * share(step) for step in range(4)])
    assert ["train/lr_matrices" in row for row in rows] == [optimizer == "muon"] * 4
    if optimizer == "muon":
        assert [row["train/lr_matrices"] for row in rows] == pytest.approx([0.02 * share(step) for step in range(4)])
