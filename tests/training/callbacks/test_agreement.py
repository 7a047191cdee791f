import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from performer_lm.training.callbacks import agreement
from performer_lm.training.callbacks.agreement import Agreement
from performer_lm.training.callbacks.saving import Checkpoints
from performer_lm.training.callbacks.stopping import StopOnSignal

Others = Callable[[list[bool]], list[str]]


class Arrival:
    """An event that notes when the host waits for it."""

    def __init__(self, waits: list[str]) -> None:
        self.waits = waits

    def synchronize(self) -> None:
        self.waits.append("waited")


@pytest.fixture
def on_accelerators(monkeypatch: pytest.MonkeyPatch) -> Others:
    """Return a function that makes another rank want what it is given, step by step, on accelerators."""

    def pretend(wishes: list[bool]) -> list[str]:
        waits: list[str] = []
        left = iter(wishes)

        def reduce(wish: torch.Tensor, op: Any) -> None:
            waits.append("asked")
            wish.clamp_(min=float(next(left)))

        monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
        monkeypatch.setattr(agreement, "send_to_host", lambda wish: (wish, Arrival(waits)))
        return waits

    return pretend


def ranks(*, step: int = 0, count: int = 2) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(
        world_size=count, global_step=step, strategy=strategy, is_global_zero=True, accumulate_grad_batches=1
    )


@pytest.mark.parametrize("own", [True, False])
def test_ranks_on_accelerators_agree_a_step_later_and_wait_for_no_step_that_runs(
    on_accelerators: Others, own: bool
) -> None:
    waits, agreed = on_accelerators([False, False, not own, False]), Agreement()
    found = [agreed.reach(ranks(), wanted=own and step == 2) for step in range(4)]
    assert found == [False, False, False, True]
    assert waits == ["asked", "waited", "asked", "waited", "asked", "waited"]


def test_one_process_and_ranks_on_cpus_agree_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda wish, op: None)
    for count in (1, 2):
        assert [Agreement().reach(ranks(count=count), wanted=wanted) for wanted in (False, True)] == [False, True]


def test_a_save_that_time_calls_for_is_made_once(on_accelerators: Others, monkeypatch: pytest.MonkeyPatch) -> None:
    on_accelerators([False] * 9)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    saving, saved = Checkpoints(Path(), every=None, minutes=1.0, keep=2), []

    def write(trainer: Any, score: float | None) -> None:
        saved.append(trainer.global_step)
        saving._mark = now
        saving._time.forget()

    monkeypatch.setattr(saving, "_write", write)
    for step in range(10):
        now = 25.0 * step
        saving.on_train_batch_start(ranks(step=step), None, None, step)
    assert saved == [4, 8]  # a minute is up at 3; and then from 4 on, at 7


def test_a_signal_to_another_rank_stops_this_one_a_step_later(on_accelerators: Others) -> None:
    on_accelerators([False, True, False])
    saved: list[int] = []
    stop = StopOnSignal(SimpleNamespace(save=lambda trainer: saved.append(trainer.global_step)))
    stopped = []
    for step in range(3):
        trainer = ranks(step=step)
        trainer.should_stop = False
        stop.on_train_batch_start(trainer, None, None, step)
        stopped.append(trainer.should_stop)
    assert stopped == [False, False, True]
    assert saved == [2]
