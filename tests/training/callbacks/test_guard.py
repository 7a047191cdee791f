import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from performer_lm.training.callbacks import guard
from performer_lm.training.callbacks.guard import NonFiniteGuard
from performer_lm.training.run import Run

Start = Callable[..., Run]
BATCHES = ["trainer.max_steps=6", "trainer.accumulate_grad_batches=2", "run_dir=runs/a"]


class Spoil(Callback):
    """Puts a number that is not finite into a gradient of step `at`; keeps that step's weights and micro-batches."""

    def __init__(self, at: int, value: float) -> None:
        self.at = at
        self.value = value
        self.batches: list[Tensor] = []
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at - 1:
            self.batches.append(batch)
            self.weights = [value.detach().clone() for value in pl_module.parameters()]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.at - 1:
            gradient = pl_module.model.head.weight.grad
            gradient[0, 0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spoilt_gradient_stops_before_the_update(start: Start, value: float) -> None:
    run, spoil = start(*BATCHES), Spoil(3, value)
    run.trainer.callbacks.append(spoil)
    with pytest.raises(FloatingPointError, match=rf"the gradient norm is {value} at step 3 .*lr_matrices"):
        run.fit()
    assert all(map(torch.equal, run.task.parameters(), spoil.weights))
    saved = torch.load("runs/a/nonfinite/step=000003-rank0.pt", weights_only=True)
    assert all(map(torch.equal, saved["batch"], spoil.batches))
    assert len(spoil.batches) == 2
    assert all(map(math.isfinite, saved["weight_norms"].values()))
    told = json.loads(Path("runs/a/nonfinite/step=000003.json").read_text())
    assert told["step"] == 3
    assert math.isfinite(told["loss"])
    assert told["not_finite_gradients"] == ["model.head.weight"]
    assert told["not_finite_weights"] == []


@pytest.mark.parametrize("words", [["trainer.save_every=1"], ["trainer.max_steps=1", "trainer.val_every=1"]])
@pytest.mark.parametrize("more", [[], ["trainer.precision=bf16-true", "callbacks.ema.decay=0.9"]])
def test_weights_that_are_not_finite_are_never_saved(start: Start, words: list[str], more: list[str]) -> None:
    run = start("optimizer.lr=1e41", "trainer.val_every=6", "trainer.max_steps=6", *words, *more, "run_dir=runs/a")
    with pytest.raises(FloatingPointError, match=r"(the weights are|at step 1 is) not finite.*lr 1e\+4[01]"):
        run.fit()
    assert list(Path("runs/a/checkpoints").glob("*")) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("share", ["one", "all"])
def test_a_validation_that_is_not_finite_stops_the_run_and_is_no_score(start: Start, bad: float, share: str) -> None:
    run = start("trainer.max_steps=4", "trainer.val_every=2", "trainer.save_every=3", "run_dir=runs/a")
    given = type(run.task.objective).__call__

    def spoilt(objective: Any, model: Any, windows: Tensor, *, step: int | None, **options: Any) -> Any:
        losses = given(objective, model, windows, step=step, **options)
        if step is None and run.trainer.global_step == 4:
            losses.nats.view(-1)[slice(1) if share == "one" else slice(None)] = bad
        return losses

    run.task.objective.__class__ = type("Spoilt", (type(run.task.objective),), {"__call__": spoilt})
    with pytest.raises(FloatingPointError, match=r"validation at step 4 is not finite \(val/loss (nan|inf)"):
        run.fit()
    folder = Path("runs/a/checkpoints")
    assert (folder / "best.ckpt").resolve().name.startswith("step=000002-val_bpb=")
    assert (folder / "last.ckpt").resolve().name == "step=000003.ckpt"
    assert math.isfinite(run.saving.best)


def test_a_validation_that_measures_nothing_says_so(start: Start) -> None:
    run = start("run_dir=runs/a")
    run.task.byte_lengths.zero_()
    with pytest.raises(FloatingPointError, match="not one token of its text stands for text"):
        run.fit()


class _Arrived:
    def synchronize(self) -> None:
        pass


def on_an_accelerator(values: Tensor) -> tuple[Tensor, Any]:
    return values.clone(), _Arrived()


def test_on_an_accelerator_it_looks_one_step_later(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "send_to_host", on_an_accelerator)
    run, spoil = start(*BATCHES, "trainer.val_every=6"), Spoil(3, math.nan)
    run.trainer.callbacks.append(spoil)
    with pytest.raises(FloatingPointError, match="the gradient norm is nan at step 3"):
        run.fit()
    assert run.trainer.global_step == 3
    saved = torch.load("runs/a/nonfinite/step=000003-rank0.pt", weights_only=True)
    assert all(map(torch.equal, saved["batch"], spoil.batches))
    assert saved["gradient_norms"] == {}


@pytest.mark.parametrize("at", [3, 6])
def test_on_an_accelerator_it_looks_before_anything_is_saved(
    start: Start, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(guard, "send_to_host", on_an_accelerator)
    run = start(*BATCHES, "trainer.val_every=3")
    run.trainer.callbacks.append(Spoil(at, math.nan))
    with pytest.raises(FloatingPointError, match=f"is nan at step {at}"):
        run.fit()
    kept = [torch.load(path, weights_only=True)["global_step"] for path in Path("runs/a").rglob("*.ckpt")]
    assert set(kept) == ({3} if at == 6 else set())


def test_a_loss_that_is_not_finite_stops_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(*BATCHES)
    weight = run.task.model.head.weight
    with torch.no_grad():
        weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 1"):
        run.fit()
    told = json.loads(Path("runs/a/nonfinite/step=000001.json").read_text())
    assert told["not_finite_weights"] == ["model.head.weight"]


@pytest.mark.parametrize(("loss", "norm", "stops"), [(1.0, math.inf, False), (math.nan, 1.0, True)])
def test_a_loss_scaler_minds_the_gradients_itself(
    steps: Any, tmp_path: Path, loss: float, norm: float, stops: bool
) -> None:
    shown, watch = steps(), NonFiniteGuard()
    shown.trainer.precision_plugin = SimpleNamespace(scaler=object())
    shown.trainer.optimizers = [torch.optim.SGD([torch.zeros(1)], lr=0.1)]
    shown.trainer.global_rank = 0
    shown.trainer.lightning_module = SimpleNamespace(named_parameters=lambda: iter(()))
    watch.run = SimpleNamespace(folder=tmp_path)  # type: ignore[assignment]
    shown.step = 1
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1") if stops else nullcontext():
        watch.on_gradients(shown.trainer, shown, loss=torch.tensor(loss), norm=torch.tensor(norm))


SPOILT = """
import os, runpy, sys
from performer_lm.objectives import Objective

mean, calls = Objective.mean, [0]

def spoilt(self, losses):
    calls[0] += 1
    return mean(self, losses) * (float("inf") if os.environ.get("LOCAL_RANK") == "1" and calls[0] == 2 else 1.0)

Objective.mean = spoilt
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_what_one_rank_meets_stops_all_of_them_before_the_update(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text of a few words, again and again. " * 400)
    (tmp_path / "spoilt.py").write_text(SPOILT)
    words = ["debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes", "trainer=ddp", "trainer.devices=2"]
    words += ["trainer.accelerator=cpu", "trainer.timeout=0.5", "run_dir=runs/a", "trainer.val_every=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29751"]
    done = subprocess.run(
        [*launch, "spoilt.py", str(Path(__file__).parents[3] / "train.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert re.search(r"error: the gradient norm is (nan|inf) at step 2 ", done.stderr), done.stderr
    assert re.search(r"exitcode *: 3 ", done.stderr), done.stderr
    folder = tmp_path / "runs/a/nonfinite"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step=000002-rank0.pt",
        "step=000002-rank1.pt",
        "step=000002.json",
    ]
    batches = [torch.load(folder / f"step=000002-rank{rank}.pt", weights_only=True)["batch"] for rank in (0, 1)]
    assert not torch.equal(batches[0][0], batches[1][0])
    saved = {path.name[:11] for path in (tmp_path / "runs/a/checkpoints").glob("step=*.ckpt")}
    assert saved == {"step=000001"}
