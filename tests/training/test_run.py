import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm import checkpoint
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run

Start = Callable[..., Run]


def losses(folder: Path) -> dict[int, float]:
    rows = read_metrics(folder / "metrics.jsonl")
    return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}


def test_a_run_leaves_its_files_and_learns(start: Start) -> None:
    run = start("trainer.max_steps=25", "trainer.val_every=10", "run_dir=runs/a")
    best = run.fit()
    assert 0 < best < math.log2(257)
    files = {str(path.relative_to("runs/a")) for path in Path("runs/a").rglob("*") if path.is_file()}
    scores = {
        int(row["step"]): row["val/bpb"] for row in read_metrics(Path("runs/a/metrics.jsonl")) if "val/bpb" in row
    }
    names = [f"step={step:06d}-val_bpb={scores[step]:.3f}.ckpt" for step in (20, 25)]  # the last two; 25 is the best
    checkpoints = {f"checkpoints/{name}{ending}" for name in names for ending in ("", ".sha256")}
    checkpoints |= {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    texts = {"config.yaml", "train.log", "metrics.jsonl", "metrics.csv", "samples.txt", "summary.json"}
    assert files == checkpoints | texts
    assert Path("runs/latest").resolve() == Path("runs/a").resolve()
    assert checkpoint.read(Path("runs/a/checkpoints/last.ckpt")).content["global_step"] == 25
    assert sorted(losses(Path("runs/a"))) == list(range(1, 26))
    assert Path("runs/a/samples.txt").read_text().count("=== sample at step") == 3


@pytest.mark.parametrize("attn", ["favor", "flash"])
def test_a_resumed_run_is_the_unbroken_one(start: Start, attn: str) -> None:
    common = [f"attn={attn}", "trainer.max_steps=9", "trainer.accumulate_grad_batches=2"]
    common += ["attn.redraw_interval=2"] if attn == "favor" else []
    start(*common, "trainer.val_every=3", "run_dir=runs/whole").fit()
    start(*common, "trainer.val_every=4", "run_dir=runs/broken").fit()
    stopped = start(*common, "trainer.val_every=4", "run_dir=runs/stopped")
    stopped.trainer.callbacks.insert(0, InterruptAt(5))
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    resumed = start(*common, "trainer.val_every=4", "ckpt=runs/stopped")
    assert resumed.folder == Path("runs/stopped").resolve()
    resumed.fit()
    whole = checkpoint.read(Path("runs/whole/checkpoints/last.ckpt")).weights
    for run in ("broken", "stopped"):
        assert losses(Path(f"runs/{run}")) == losses(Path("runs/whole"))
        other = checkpoint.read(Path(f"runs/{run}/checkpoints/last.ckpt")).weights
        assert all(torch.equal(value, other[name]) for name, value in whole.items())


class InterruptAt(Callback):
    """Presses Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            signal.raise_signal(signal.SIGINT)


def test_exact_chunked_and_flash_train_alike(start: Start) -> None:
    curves = []
    for attn in ("exact", "chunked", "flash"):
        steps = ["trainer.max_steps=20", "trainer.val_every=20"]
        # Muon orthogonalises in bfloat16, which turns rounding of the eighth digit into the third
        start(f"attn={attn}", "optimizer=adamw", *steps, f"run_dir=runs/{attn}").fit()
        curves.append(losses(Path(f"runs/{attn}")))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-4)


def test_resuming_another_run_is_refused(start: Start) -> None:
    start("run_dir=runs/a").fit()
    with pytest.raises(ValueError, match=r"belongs to another run: model\.dim was 32, is 64"):
        start("ckpt=runs/a", "model.dim=64")
    with pytest.raises(ValueError, match=r"fingerprint\.batch_size was 4, is 8"):
        start("ckpt=runs/a", "data.batch_size=8")
    with pytest.raises(ValueError, match=r"trainer\.max_steps \(2\) must be at least the step .* \(4\)"):
        start("ckpt=runs/a", "trainer.max_steps=2")


def test_resuming_a_finished_run_takes_no_step(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    best = start("run_dir=runs/a").fit()
    before = losses(Path("runs/a"))
    assert start("ckpt=runs/a").fit() == pytest.approx(best)
    assert "has finished; to go on: python train.py" in capsys.readouterr().out
    assert losses(Path("runs/a")) == before


def test_nothing_is_written_where_something_is_wrong(start: Start) -> None:
    before = set(Path().rglob("*"))
    for wrong in ("model.heads=5", "attn.num_features=0", "schedule.warmup=5", "trainer.val_every=0", "ckpt=nowhere"):
        with pytest.raises(ValueError, match=r"\d|nowhere"):
            start(wrong)
    assert set(Path().rglob("*")) == before


def test_folders_are_never_shared(start: Start) -> None:
    start("run_dir=runs/a").fit()
    assert start("run_dir=runs/a").folder == Path("runs/a-2")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_change_that_was_allowed_takes_effect(start: Start, optimizer: str) -> None:
    common = [f"optimizer={optimizer}", "schedule=constant", "schedule.warmup=0"]
    start(*common, "optimizer.lr=0.01", "run_dir=runs/a").fit()
    with pytest.raises(ValueError, match=r"optimizer\.lr was 0\.01, is 0\.002"):
        start(*common, "optimizer.lr=0.002", "trainer.max_steps=6", "ckpt=runs/a")
    run = start(*common, "optimizer.lr=0.002", "trainer.max_steps=6", "ckpt=runs/a", "resume.allow=[optimizer.lr]")
    run.fit()
    assert any(group["lr"] == pytest.approx(0.002) for group in run.trainer.optimizers[0].param_groups)
    assert any("optimizer.lr was 0.01, is 0.002" in line for line in Path("runs/a/train.log").read_text().splitlines())


def test_accumulation_may_change_where_it_is_allowed(start: Start) -> None:
    common = ["trainer.max_steps=6", "trainer.log_every=1", "optimizer=adamw"]
    start(*common, "run_dir=runs/whole").fit()
    start(*common, "trainer.val_every=2", "trainer.keep_checkpoints=9", "run_dir=runs/a").fit()
    [middle] = Path("runs/a/checkpoints").glob("step=000002*.ckpt")
    allow = "resume.allow=[fingerprint.accumulation]"
    start(*common, "trainer.accumulate_grad_batches=2", allow, f"ckpt='{middle}'").fit()
    assert losses(Path("runs/a")) == pytest.approx(losses(Path("runs/whole")), rel=1e-4)
