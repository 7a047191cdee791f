from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.evaluation.approximation.model import diagnose
from performer_lm.training.callbacks.diagnostics import ApproximationDiagnostics, diagnostics
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run

Start = Callable[..., Run]
EVERY = "callbacks.diagnostics.every=2"


def found(run: str) -> dict[int, dict[str, float]]:
    rows = read_metrics(Path(f"runs/{run}/metrics.jsonl"))
    return {int(row["step"]): row for row in rows if any(name.startswith("favor/") for name in row)}


def test_it_logs_what_the_model_at_that_step_shows(start: Start) -> None:
    run = start(EVERY, "attn=favor", "trainer.log_every=3", "run_dir=runs/a")
    run.fit()
    rows = found("a")
    assert sorted(rows) == [2, 4]
    model, _ = checkpoint.open_model(checkpoint.read(Path("runs/a/checkpoints/last.ckpt")))
    batch = next(iter(run.data.val_dataloader()))[:1, :-1]
    expected = diagnose(model, batch)
    assert len(rows[4]) == 1 + sum(len(layer) for layer in expected.values())
    for layer, findings in expected.items():
        for name, value in findings._asdict().items():
            assert rows[4][f"favor/{name}/{layer}"] == pytest.approx(float(value.mean()), rel=1e-4)


@pytest.mark.parametrize("options", [["model.dropout=0.2"], ["attn/features=optimal"]], ids=["dropout", "optimal"])
def test_it_changes_nothing_of_the_run(start: Start, options: list[str]) -> None:
    for run, more in {"with": [EVERY], "without": []}.items():
        start("attn=favor", *options, *more, "trainer.max_steps=5", f"run_dir=runs/{run}").fit()
    one, other = (checkpoint.read(Path(f"runs/{run}/checkpoints/last.ckpt")).weights for run in ("with", "without"))
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])) for name, value in one.items())
    assert found("with")
    assert not found("without")


SEQ2SEQ = ["debug=[]", "model.encoder.depth=1", "model.decoder.depth=1", "model.dim=64", "trainer.max_steps=2"]
TRAINED = {
    "mlm": (["objective=mlm", "model=performer_encoder"], ["layer0", "layer1"]),
    "seq2seq": (
        ["objective=seq2seq", "model=performer_seq2seq", *SEQ2SEQ, "data.context=32", "data.batch_size=2"],
        ["decoder/layer0", "decoder/layer0/cross", "encoder/layer0"],
    ),
}


@pytest.mark.parametrize(("options", "layers"), TRAINED.values(), ids=TRAINED)
def test_it_runs_whatever_the_objective_trains(start: Start, options: list[str], layers: list[str]) -> None:
    start(EVERY, *options, "data.validation_bytes=256", "run_dir=runs/a").fit()
    measured = [name for name in found("a")[2] if name.startswith("favor/total_variation/")]
    assert sorted(measured) == [f"favor/total_variation/{layer}" for layer in layers]


def test_softmax_has_nothing_to_diagnose(start: Start) -> None:
    start(EVERY, "attn=flash", "run_dir=runs/a").fit()
    assert not found("a")
    assert Path("runs/a/train.log").read_text().count("no layer that runs random features") == 1


def test_null_is_off_and_counts_are_checked() -> None:
    assert diagnostics(every=None, diagnose=diagnose, sequences=1) is None
    with pytest.raises(ValueError, match=r"every must be at least 1, got 0"):
        ApproximationDiagnostics(every=0, diagnose=diagnose, sequences=1)
    with pytest.raises(ValueError, match=r"sequences must be at least 1, got 0"):
        ApproximationDiagnostics(every=1, diagnose=diagnose, sequences=0)
