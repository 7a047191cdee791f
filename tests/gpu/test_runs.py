"""Runs of train.py and generate.py on a CUDA device repeat, resume, and do not wait for it."""

import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.training.task import LanguageModelTask

pytestmark = pytest.mark.gpu

LAYERS = 2
Train = Callable[..., list[dict[str, float]]]


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["train/loss"] for row in rows]


def test_windows_may_be_gathered_on_the_device(train: Train) -> None:
    resident, gathered = (train(f"data.device_resident={flag}", f"run_dir=runs/{flag}") for flag in ("true", "false"))
    assert losses(resident) == pytest.approx(losses(gathered), rel=1e-5)


@pytest.mark.parametrize(("attn", "looks"), [("flash", 0), ("delta", 0), ("favor", 2 * LAYERS)])
def test_steps_do_not_wait_for_the_device_but_for_a_flag_of_favors_blocks(
    train: Train, monkeypatch: pytest.MonkeyPatch, attn: str, looks: int
) -> None:
    start = LanguageModelTask.on_train_batch_start

    def watch(task: LanguageModelTask, batch: Any, batch_idx: int) -> int | None:
        torch.cuda.set_sync_debug_mode("warn" if 3 <= task.step < 23 else "default")
        return start(task, batch, batch_idx)

    monkeypatch.setattr(LanguageModelTask, "on_train_batch_start", watch)
    options = ["trainer.max_steps=24", "trainer.log_every=100", "trainer.precision=bf16-mixed"]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            train(f"attn={attn}", *options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = Counter(f"{told.filename}:{told.lineno}" for told in seen if "called a synchronizing" in str(told.message))
    assert waits.total() <= 20 * looks, waits


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("attn", ["favor", "flash", "delta"])
def test_a_run_goes_on_bit_for_bit_where_steps_must_repeat(train: Train, attn: str, precision: str) -> None:
    options = [f"attn={attn}", f"trainer.precision={precision}", "trainer.deterministic=true", "model.dropout=0.1"]
    options += ["trainer.max_steps=20", "trainer.save_every=10", "trainer.keep_checkpoints=9"]
    whole = train(*options, "run_dir=runs/whole")
    shutil.copytree("runs/whole", "runs/again", symlinks=True)
    again = train(*options, "run_dir=runs/again", "ckpt=runs/again/checkpoints/step=000010.ckpt")
    assert losses(again) == losses(whole)
    ours, theirs = (checkpoint.read(Path(f"runs/{run}/checkpoints/last.ckpt")).weights for run in ("again", "whole"))
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.parametrize("attn", ["favor", "flash", "delta"])
def test_a_mixed_run_learns_as_a_float32_one_does(train: Train, attn: str) -> None:
    options = [f"attn={attn}", "trainer.max_steps=50", "model.dim=64", "data.batch_size=16"]
    half, full = (
        train(*options, f"trainer.precision={each}", f"run_dir=runs/{each}") for each in ("bf16-mixed", "32-true")
    )
    assert losses(full)[-1] < 0.8 * losses(full)[0]
    assert losses(half) == pytest.approx(losses(full), rel=0.02)  # 50 steps apart by eight bits each


@pytest.mark.parametrize("attn", ["favor", "delta", "flash", "local attn.window=16"])
def test_the_likeliest_tokens_are_a_cpus(
    train: Train, invoke: Callable[..., tuple[int, str, str]], device: torch.device, attn: str
) -> None:
    train(*f"attn={attn} trainer.max_steps=30".split())
    words = ["ckpt=runs/new", "prompt=line 7", "temperature=0", "max_new_tokens=40"]
    told = [invoke(*words, f"device={kind}", script="generate.py") for kind in ("cpu", device.type)]
    assert [code for code, *_ in told] == [0, 0], told
    assert told[0][1] == told[1][1]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_learn_what_others_do(train: Train) -> None:
    compiled, eager = (train(f"compile={flag}", "model.depth=1", f"run_dir=runs/{flag}") for flag in ("true", "false"))
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
