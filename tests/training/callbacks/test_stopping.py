import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm import checkpoint
from performer_lm.training.callbacks.stopping import requeue
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run

Start = Callable[..., Run]
COMMON = ["trainer.max_steps=6", "trainer.val_every=3", "trainer.log_every=1", "trainer.accumulate_grad_batches=2"]


class SignalAt(Callback):
    """Sends this process signals at the beginning of a micro-batch, counted from 0."""

    def __init__(self, micro_batch: int, *signals: int) -> None:
        self.micro_batch = micro_batch
        self.signals = signals

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.micro_batch:
            for signum in self.signals:
                signal.raise_signal(signum)


def rows(folder: str) -> list[dict[str, float]]:
    found = read_metrics(Path(folder) / "metrics.jsonl")
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in found]


def assert_goes_on_exactly(start: Start) -> None:
    """Resume `runs/a` and compare it with an unbroken run."""
    start(*COMMON, "ckpt=runs/a").fit()
    start(*COMMON, "run_dir=runs/whole").fit()
    assert rows("runs/a") == rows("runs/whole")
    one, other = (checkpoint.read(Path(f"runs/{run}/checkpoints/last.ckpt")).weights for run in ("a", "whole"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("micro_batch", [2, 3], ids=["between steps", "inside an accumulated step"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_lets_the_step_end_saves_and_the_run_goes_on_exactly(
    start: Start, micro_batch: int, times: int
) -> None:
    run = start(*COMMON, "run_dir=runs/a")
    run.trainer.callbacks.insert(0, SignalAt(micro_batch, *[signal.SIGTERM] * times))
    with pytest.raises(SystemExit) as ending:
        run.fit()
    assert ending.value.code == 143
    saved = checkpoint.read(Path("runs/a/checkpoints/last.ckpt"))
    assert saved.content["global_step"] == (1 if micro_batch == 2 else 2)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert_goes_on_exactly(start)


@pytest.mark.parametrize("call", range(1, 7))
def test_a_signal_inside_a_save_costs_nothing(start: Start, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    real, calls = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGTERM)
        real(handle)

    run = start(*COMMON, "run_dir=runs/a")
    monkeypatch.setattr("performer_lm.checkpoint.files.os.fsync", fsync)
    with pytest.raises(SystemExit) as ending:
        run.fit()
    assert ending.value.code == 143
    assert calls >= call
    monkeypatch.undo()
    assert [path.name for path in Path("runs/a/checkpoints").glob("*.tmp*")] == []
    for path in checkpoint.candidates(Path("runs/a")):
        checkpoint.read(path)


def test_a_second_interrupt_stops_at_once(start: Start) -> None:
    run = start(*COMMON, "run_dir=runs/a")
    run.trainer.callbacks.insert(0, SignalAt(3, signal.SIGINT, signal.SIGINT))
    with pytest.raises(SystemExit) as ending:
        run.fit()
    assert isinstance(ending.value.__context__, KeyboardInterrupt)  # which the command line turns into 130
    assert not list(Path("runs/a/checkpoints").glob("step=*.ckpt"))
    assert [row["step"] for row in rows("runs/a")] == [1]


@pytest.mark.parametrize(
    ("scontrol", "told"),
    [
        ("", "scontrol: no such file or directory"),
        ("echo invalid job >&2; exit 1", "cannot be put back in the queue: invalid job"),
        ('[ "$1 $2" = "requeue 7_3" ]', "put back in the queue as job 7_3"),
    ],
)
def test_a_job_goes_back_in_the_queue_or_the_log_says_why_not(
    scontrol: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if scontrol:
        command = tmp_path / "scontrol"
        command.write_text(f"#!/bin/sh\n{scontrol}\n")
        command.chmod(0o755)
    for name, value in {"PATH": tmp_path, "SLURM_JOB_ID": 9, "SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 3}.items():
        monkeypatch.setenv(name, str(value))
    with caplog.at_level(logging.INFO):
        requeue()
    assert told.lower() in caplog.text.lower()


def test_the_end_of_the_terminal_saves_and_stops_unless_it_is_to_be_outlived(start: Start) -> None:
    run = start(*COMMON, "run_dir=runs/a")
    run.trainer.callbacks.insert(0, SignalAt(2, signal.SIGHUP))
    with pytest.raises(SystemExit) as ending:
        run.fit()
    assert ending.value.code == 143
    assert checkpoint.read(Path("runs/a/checkpoints/last.ckpt")).content["global_step"] == 1
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run = start(*COMMON, "run_dir=runs/b")
        run.trainer.callbacks.insert(0, SignalAt(2, signal.SIGHUP))
        run.fit()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.read(Path("runs/b/checkpoints/last.ckpt")).content["global_step"] == 6
