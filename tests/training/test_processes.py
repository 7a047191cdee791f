import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from performer_lm.training.processes import OVERRIDES, make_strategy, started_processes
from performer_lm.training.run import Run

Start = Callable[..., Run]
SHARED = ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["optimizer=muon"], "optimizer=muon needs whole matrices: choose optimizer=adamw, or trainer=ddp"),
        (["optimizer=adamw", "callbacks.ema.decay=0.9"], "callbacks.ema.decay needs whole weights"),
        (["optimizer=adamw", "model.reversible=true"], "model.reversible=true keeps no graph to share"),
        (["optimizer=adamw", "trainer.strategy=fsdq"], "trainer.strategy must be one of auto, ddp, fsdp, got 'fsdq'"),
        (["optimizer=adamw", "trainer.timeout=0"], "trainer.timeout must be above 0 and at most 1000000, got 0"),
        (["optimizer=adamw", "data.batch_size=3"], r"data.batch_size \(3\) must be a multiple of ranks \(2\)"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_in_one_line(
    start: Start, options: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        start(*SHARED, *options)
    assert len(str(raised.value).splitlines()) == 1


def test_a_wait_has_an_end() -> None:
    strategy: Any = make_strategy("ddp", timeout=0.5)
    assert strategy._timeout.total_seconds() == 30


def test_what_started_processes_were_told_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "7")
    trainer: Any = SimpleNamespace(world_size=2, global_rank=0, strategy=SimpleNamespace(launcher=object()))
    with started_processes(trainer, ["a=1"]):
        assert json.loads(os.environ[OVERRIDES]) == ["a=1", "hydra.mode=RUN"]
        os.environ.update(LOCAL_RANK="0", WORLD_SIZE="2")
    assert (os.environ.get("LOCAL_RANK"), os.environ["WORLD_SIZE"], OVERRIDES in os.environ) == (None, "7", False)
