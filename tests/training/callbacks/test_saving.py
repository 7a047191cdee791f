import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm import checkpoint
from performer_lm.training.callbacks.saving import Checkpoints
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run

Start = Callable[..., Run]
COMMON = ["trainer.max_steps=9", "trainer.val_every=3", "trainer.log_every=1", "trainer.accumulate_grad_batches=2"]


def files(run: str) -> list[str]:
    return sorted(path.name for path in Path(f"{run}/checkpoints").iterdir() if path.suffix == ".ckpt")


def steps(run: str) -> list[int]:
    return sorted(int(name[5:11]) for name in files(run) if name.startswith("step="))


def target(link: str) -> str:
    return Path(link).resolve().name


def test_the_best_the_last_and_the_one_before_it_are_kept(start: Start) -> None:
    run = start(*COMMON, "trainer.save_every=2", "optimizer.lr=0", "optimizer.matrix_lr=0", "run_dir=runs/a")
    run.fit()  # it learns nothing, so that the first validation stays the best
    assert steps("runs/a") == [3, 8, 9]
    assert target("runs/a/checkpoints/best.ckpt").startswith("step=000003-val_bpb=")
    assert target("runs/a/checkpoints/last.ckpt").startswith("step=000009-val_bpb=")
    assert "step=000008.ckpt" in files("runs/a")


def test_a_run_goes_on_alike_from_every_checkpoint_it_made(start: Start) -> None:
    options = [*COMMON, "attn=favor", "attn/features=optimal", "attn.redraw_interval=3", "model.dropout=0.1"]
    start(*options, "trainer.save_every=2", "trainer.keep_checkpoints=20", "run_dir=runs/whole").fit()
    assert steps("runs/whole") == [2, 3, 4, 6, 8, 9]
    whole = checkpoint.read(Path("runs/whole/checkpoints/last.ckpt"))
    for name in files("runs/whole")[2:-1]:
        shutil.copytree("runs/whole", "runs/again", symlinks=True)
        run = start(*options, "trainer.save_every=5", f"ckpt='runs/again/checkpoints/{name}'")
        run.fit()
        again = checkpoint.read(Path("runs/again/checkpoints/last.ckpt"))
        assert all(torch.equal(value, again.weights[key]) for key, value in whole.weights.items())
        assert torch.equal(whole.content["random"][0]["torch"], again.content["random"][0]["torch"])
        assert record("runs/again") == record("runs/whole")
        assert Path("runs/again/samples.txt").read_bytes() == Path("runs/whole/samples.txt").read_bytes()
        shutil.rmtree("runs/again")


def record(run: str) -> list[dict[str, float]]:
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in rows]


def test_a_grown_run_is_the_longer_one(start: Start) -> None:
    options = ["trainer.val_every=2", "schedule=constant", "trainer.log_every=3"]
    for length in (3, 5, 8):  # twice and three times resumed
        start(*options, f"trainer.max_steps={length}", "run_dir=runs/grown", "ckpt=auto").fit()
    start(*options, "trainer.max_steps=8", "run_dir=runs/whole").fit()
    weights = [checkpoint.read(Path(f"runs/{run}/checkpoints/last.ckpt")).weights for run in ("grown", "whole")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    train = [[row for row in record(f"runs/{run}") if "train/loss" in row] for run in ("grown", "whole")]
    assert [row for row in train[0] if row["step"] in (3, 6, 8)] == train[1]


class SaveInside(Callback):
    """Asks for a checkpoint between the micro-batches of a step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.save_checkpoint("inside.ckpt")


def test_a_save_inside_a_step_is_refused(start: Start) -> None:
    run = start(*COMMON)
    run.trainer.callbacks.insert(0, SaveInside())
    with pytest.raises(RuntimeError, match="a checkpoint inside step 1 would lose the gradients"):
        run.fit()
    assert not Path("inside.ckpt").exists()


def test_what_a_killed_save_left_is_swept(start: Start) -> None:
    start("run_dir=runs/a").fit()
    Path("runs/a/checkpoints/step=000003.ckpt.123.tmp").touch()
    start("ckpt=runs/a", "trainer.max_steps=5").fit()
    assert list(Path("runs/a/checkpoints").glob("*.tmp")) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("every", 0, "every must be at least 1"),
        ("minutes", 0.0, "minutes must be above 0"),
        ("keep", 1, "keep must be at least 2"),
    ],
)
def test_what_is_out_of_range_is_refused(option: str, value: float, message: str) -> None:
    options: dict[str, Any] = {"every": None, "minutes": None, "keep": 2}
    with pytest.raises(ValueError, match=message):
        Checkpoints(Path(), **{**options, option: value})


def test_time_calls_for_saves_too(start: Start) -> None:
    run = start(*COMMON, "trainer.save_minutes=0.000001", "trainer.keep_checkpoints=20", "run_dir=runs/a")
    run.fit()
    assert steps("runs/a") == list(range(10))
    assert math.isfinite(run.saving.best)


@pytest.mark.parametrize("first", [0, 4])
def test_checkpoints_that_lie_there_count_after_a_resume_and_the_best_stays(start: Start, first: int) -> None:
    still = ["optimizer.lr=0", "optimizer.matrix_lr=0", "schedule=constant", "trainer.val_every=3"]  # 3 stays the best
    common = [*still, "trainer.save_every=1", "trainer.keep_checkpoints=4"]
    start(*common, "trainer.max_steps=6", "run_dir=runs/a").fit()
    assert steps("runs/a") == [3, 4, 5, 6]
    assert target("runs/a/checkpoints/best.ckpt").startswith("step=000003")
    ckpt = "ckpt=runs/a" if not first else f"ckpt='runs/a/checkpoints/step=00000{first}.ckpt'"
    run = start(*common, "trainer.max_steps=8", ckpt)
    kept: list[list[int]] = []
    write = run.saving._write

    def record(*arguments: Any) -> None:
        write(*arguments)
        kept.append(steps("runs/a"))

    run.saving._write = record  # type: ignore[method-assign]
    run.fit()
    went = {0: [[3, 4, 5, 6, 7], [3, 5, 6, 7, 8]], 4: [[3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6, 7], [3, 5, 6, 7, 8]]}
    assert kept == went[first]
    assert target("runs/a/checkpoints/best.ckpt").startswith("step=000003")
    assert target("runs/a/checkpoints/last.ckpt").startswith("step=000008")


@pytest.mark.parametrize("changed", ["data.validation_bytes=400", "data.validation_fraction=0.3", "data.context=32"])
def test_another_validation_starts_the_best_score_anew_and_says_so(start: Start, changed: str) -> None:
    allow = "resume.allow=[fingerprint]"
    start("callbacks.early_stopping.patience=2", "run_dir=runs/a").fit()
    content = checkpoint.read(Path("runs/a/checkpoints/last.ckpt")).content
    assert any("best_score" in state for state in content["callbacks"].values())
    for same in ([], ["objective.chunk_size=8"]):
        run = start("callbacks.early_stopping.patience=2", *same, "trainer.max_steps=6", "ckpt=runs/a", allow)
        assert math.isfinite(run.saving.best)
        assert not any("best" in note for note in run.notes)
        run.run_folder.release()
    run = start("callbacks.early_stopping.patience=2", changed, "trainer.max_steps=6", "ckpt=runs/a", allow)
    assert math.isnan(run.saving.best)
    assert any(note.startswith("the best score starts anew") for note in run.notes)
    assert not any("best_score" in state for state in run.resumed.content["callbacks"].values())
    run.fit()
    assert run.saving.best == run.trainer.callback_metrics["val/bpb"].item()
    assert target("runs/a/checkpoints/best.ckpt").startswith("step=000006")
