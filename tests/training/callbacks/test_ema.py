from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm import checkpoint
from performer_lm.data.windows import FiniteWindows
from performer_lm.evaluation.perplexity import measure_perplexity
from performer_lm.evaluation.scoring import score_windows
from performer_lm.training.callbacks.ema import WeightAverage, average_weights
from performer_lm.training.run import Run

Start = Callable[..., Run]
EMA = "callbacks.ema.decay=0.6"
LAST = "checkpoints/last.ckpt"


class Recorder(Callback):
    """Keeps all weights at the start and after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def record(self, pl_module: LightningModule) -> None:
        self.weights.append({name: value.detach().clone() for name, value in pl_module.model.named_parameters()})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        self.record(pl_module)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_it_is_the_average_of_the_weights_after_each_step(start: Start, precision: str) -> None:
    run, recorder = start(EMA, f"trainer.precision={precision}", "trainer.max_steps=5", "run_dir=runs/a"), Recorder()
    run.trainer.callbacks.append(recorder)
    run.fit()
    expected = {name: value.double() for name, value in recorder.weights[0].items()}
    for step in range(1, 6):
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in expected.items():
            value.mul_(decay).add_(recorder.weights[step][name], alpha=1 - decay)
    saved = checkpoint.read(Path("runs/a") / LAST)
    assert set(saved.content["averages"]) == set(expected)
    own = dict(run.task.measured.named_parameters())
    for name, value in expected.items():
        assert saved.weights[name].dtype == torch.float32
        torch.testing.assert_close(saved.weights[name], value.float())
        assert torch.equal(own[name], saved.weights[name].to(own[name].dtype))  # what validated, in the run's dtype
        assert torch.equal(saved.content["state_dict"][f"model.{name}"], recorder.weights[5][name])


def test_projections_are_left_alone(start: Start) -> None:
    run = start(EMA, "attn=favor", "attn.redraw_interval=2", "trainer.max_steps=5", "run_dir=runs/a")
    run.fit()
    own = dict(run.task.model.named_buffers())
    averaged = dict(run.task.measured.named_buffers())
    assert run.task.measured is not run.task.model
    assert any(name.endswith("projection") for name in own)
    assert all(torch.equal(averaged[name], buffer) for name, buffer in own.items())


@pytest.mark.parametrize("options", [[], ["model.tie_embeddings=true"]], ids=["own head", "tied"])
def test_validation_and_opening_use_the_average(start: Start, options: list[str]) -> None:
    run = start(EMA, *options, "optimizer=adamw", "optimizer.lr=0.1", "run_dir=runs/a")
    run.fit()
    found = run.trainer.callback_metrics["val/bpb"].item()
    saved = checkpoint.read(Path("runs/a") / LAST)
    model, _ = checkpoint.open_model(saved)
    windows: FiniteWindows = run.data.val_dataloader().dataset._windows  # type: ignore[attr-defined]
    measured = measure_perplexity(
        score_windows(model, windows, objective=run.task.objective, batch_size=4), byte_lengths=windows.byte_lengths
    )
    assert measured.bits_per_byte == pytest.approx(found, rel=1e-5)
    raw = saved._replace(weights={k.removeprefix("model."): v for k, v in saved.content["state_dict"].items()})
    unlike = measure_perplexity(
        score_windows(checkpoint.open_model(raw)[0], windows, objective=run.task.objective, batch_size=4),
        byte_lengths=windows.byte_lengths,
    )
    assert unlike.bits_per_byte != pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_a_resumed_average_is_the_unbroken_one(start: Start, precision: str) -> None:
    common = [EMA, "trainer.max_steps=8", "trainer.accumulate_grad_batches=2"]
    common += ["attn=favor", "attn.redraw_interval=3"]
    common.append(f"trainer.precision={precision}")
    start(*common, "trainer.val_every=4", "run_dir=runs/whole").fit()
    part = start(*common, "trainer.val_every=4", "run_dir=runs/part")
    part.trainer.callbacks.append(Fail(at=5))
    with pytest.raises(RuntimeError, match="no step 5"):
        part.fit()
    start(*common, "trainer.val_every=4", "ckpt=runs/part").fit()
    whole, part = (checkpoint.read(Path(f"runs/{name}") / LAST).content for name in ("whole", "part"))
    for key in ("averages", "state_dict"):
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(part[key][name])) for name, value in whole[key].items()
        )


class Fail(Callback):
    """Fails in the middle of a step, or of its validation."""

    def __init__(self, *, at: int, validating: bool = False) -> None:
        self.at = at
        self.validating = validating

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        if not self.validating and trainer.global_step == self.at - 1:
            raise RuntimeError(f"no step {self.at}")

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if self.validating and trainer.global_step == self.at:
            raise RuntimeError(f"no validation at {self.at}")


def test_a_failing_validation_leaves_the_weights(start: Start) -> None:
    run, recorder = start(EMA, "run_dir=runs/a"), Recorder()
    run.trainer.callbacks += [recorder, Fail(at=2, validating=True)]
    with pytest.raises(RuntimeError, match="no validation at 2"):
        run.fit()
    assert all(torch.equal(value, recorder.weights[-1][name]) for name, value in run.task.model.named_parameters())


def test_a_run_may_begin_to_average_when_it_resumes(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("run_dir=runs/a").fit()
    start(EMA, "trainer.max_steps=6", "ckpt=runs/a").fit()
    assert "holds no average of weights" in capsys.readouterr().out
    assert "averages" in checkpoint.read(Path("runs/a") / LAST).content


def test_averages_of_earlier_versions_in_bfloat16_open_and_go_on(start: Start) -> None:
    words = [EMA, "trainer.precision=bf16-true"]
    start(*words, "run_dir=runs/a").fit()
    path = (Path("runs/a") / LAST).resolve()
    content = checkpoint.read(path).content
    content["averages"] = {name: value.bfloat16() for name, value in content["averages"].items()}
    checkpoint.save(content, path)
    model, _ = checkpoint.open_model(checkpoint.read(path))
    assert all(torch.equal(value, content["averages"][name].float()) for name, value in model.named_parameters())
    start(*words, "trainer.max_steps=6", "ckpt=runs/a").fit()
    assert {value.dtype for value in checkpoint.read(Path("runs/a") / LAST).content["averages"].values()} == {
        torch.float32
    }


@pytest.mark.parametrize("left_out", [[], ["callbacks.ema.decay=null"], ["~callbacks.ema"], ["callbacks=[samples]"],
                                      ["callbacks.ema.decay=0.9"]], ids=str)  # fmt: skip
def test_a_resume_without_the_average_or_with_another_is_refused_unless_it_is_allowed(
    start: Start, left_out: list[str]
) -> None:
    start(EMA, "run_dir=runs/a").fit()
    new = "0.9" if "0.9" in str(left_out) else "None"
    with pytest.raises(ValueError, match=rf"callbacks\.ema\.decay was 0\.6, is {new} \(resume\.allow="):
        start(*left_out, "trainer.max_steps=6", "ckpt=runs/a")
    run = start(*left_out, "trainer.max_steps=6", "ckpt=runs/a", "resume.allow=[callbacks.ema.decay]")
    assert f"changed since the checkpoint: callbacks.ema.decay was 0.6, is {new}" in run.notes
    run.run_folder.release()


def test_a_file_that_does_not_tell_the_decay_is_not_resumed_without_an_average(start: Start) -> None:
    start(EMA, "run_dir=runs/a").fit()
    last = (Path("runs/a") / LAST).resolve()
    content = checkpoint.read(last).content
    del content["performer_lm"]["training"]["callbacks"]
    checkpoint.save(content, last)
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay was 'set', is None"):
        start("trainer.max_steps=6", "ckpt=runs/a")
    start(EMA, "trainer.max_steps=6", "ckpt=runs/a").run_folder.release()


def test_null_is_off_and_other_decays_are_refused() -> None:
    assert average_weights(decay=None) is None
    for decay in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=r"decay must be above 0 and below 1"):
            WeightAverage(decay=decay)
