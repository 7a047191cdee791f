"""A run goes on from a training state that is in kind its own, or says in one line what is not."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.training.restoring import check_callbacks, check_state
from performer_lm.training.run import Run

Start = Callable[..., Run]
NOTHING = object()
SMALL = ["model.dim=32", "model.depth=1", "model.heads=4", "~callbacks.samples", "callbacks.early_stopping.patience=9"]
LOOPS = "loops/fit_loop"
GROUP = "optimizer_states/0/{part}param_groups/0"
STATE = "optimizer_states/0/{part}state/0"
RANDOM = "random/0"
STOPPING = "EarlyStopping{'monitor': 'val/bpb', 'mode': 'min'}"
CHANGES: list[tuple[str, Any]] = [
    *((name, NOTHING) for name in ("global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")),
    *((name, []) for name in ("optimizer_states", "lr_schedulers")),
    *(
        (f"{name}/0", value)
        for name in ("optimizer_states", "lr_schedulers", "random")
        for value in ("x", [], {}, None)
    ),
    ("optimizer_states", [{}, {}]),
    *(("pytorch-lightning_version", value) for value in (NOTHING, 2, "x", "0.9.0", "2.6.6; import os")),
    *((LOOPS, value) for value in (NOTHING, [], {}, 3)),
    *((f"{LOOPS}/epoch_loop.batch_progress", value) for value in (NOTHING, [], {}, {"total": 3})),
    *((f"{LOOPS}/epoch_loop.batch_progress/total/ready", value) for value in (NOTHING, "x", -1, 1.5, None)),
    *((f"{LOOPS}/epoch_loop.batch_progress/is_last_batch", value) for value in (NOTHING, "x", 1)),
    *((f"{LOOPS}/state_dict/combined_loader", value) for value in (NOTHING, [], [1], {}, [{"done": 1}])),
    (f"{LOOPS}/epoch_loop.automatic_optimization.optim_progress/optimizer/step/total/completed", 1),
    ("state_dict/model.head.weight", torch.zeros(3)),
    ("state_dict/model.head.weight", torch.zeros(257, 32, dtype=torch.int64)),
    ("state_dict/model.head.weight", NOTHING),
    ("state_dict/model.more", torch.zeros(3)),
    *((f"{RANDOM}/{name}", value) for name in ("python", "numpy", "torch") for value in (NOTHING, None, [], "x")),
    (f"{RANDOM}/python/1", [0] * 625 + [1]),
    (f"{RANDOM}/python/1/0", -1),
    (f"{RANDOM}/python/1/624", 10**9),
    *((f"{RANDOM}/numpy/1", value) for value in (10**9, -1, 625, 1.5, "x")),
    (f"{RANDOM}/numpy/0", torch.zeros(3, dtype=torch.int64)),
    (f"{RANDOM}/torch", torch.zeros(5056, dtype=torch.uint8)),
    (f"{RANDOM}/device", "x"),
    *((f"lr_schedulers/0/{name}", value) for name in ("base_lrs", "last_epoch") for value in (NOTHING, "x", None, [1])),
    ("lr_schedulers/0/last_epoch", -1),
    *((f"lr_schedulers/0/{name}", "x") for name in ("optimizer", "get_lr", "step", "_last_lr")),
    *((f"{GROUP}/{name}", value) for name in ("lr", "weight_decay") for value in (NOTHING, "x", None, [1])),
    *((f"{GROUP}/params", value) for value in (NOTHING, [], "x", None)),
    *((STATE, value) for value in ([], "x", {}, {"x": 1}, torch.zeros(3))),
    *((f"{STATE}/{{kept}}", value) for value in (NOTHING, "x", 1, torch.zeros(3), None)),
    ("optimizer_states/0/{part}state/9999", {"step": 1}),
    ("callbacks/StabilityMonitor", []),
    *(("callbacks/StabilityMonitor/running", value) for value in (NOTHING, [1.0], "x", [1.0, None, 2.0])),
    *((f"callbacks/stopping/{name}", value) for name in ("wait_count", "best_score") for value in (NOTHING, "x")),
]


def changed(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy with the value at a place such as `random/0/python`; `NOTHING` takes it out."""
    content = copy.deepcopy(content)
    *outer, last = (
        int(name) if name.isdigit() else STOPPING if name == "stopping" else name for name in key.split("/")
    )
    inside: Any = content
    for name in outer:
        inside = inside[name]
    if value is NOTHING:
        del inside[last]
    else:
        inside[last] = value
    return content


@pytest.mark.parametrize(
    ("optimizer", "part", "kept"),
    [("muon", "parts/0/", "momentum_buffer"), pytest.param("adamw", "", "exp_avg", marks=pytest.mark.slow)],
)
def test_training_goes_on_from_its_own_state_alone(start: Start, optimizer: str, part: str, kept: str) -> None:
    words = [f"optimizer={optimizer}", *SMALL]
    start(*words, "trainer.max_steps=2", "run_dir=runs/a").fit()
    run = start(*words, "trainer.max_steps=3", "ckpt=runs/a")
    assert run.resumed is not None
    content = checkpoint.read(run.resumed.path).content

    def problem(given: dict[str, Any]) -> str:
        resumed = run.resumed._replace(content=given)  # type: ignore[union-attr]
        try:
            check_state(resumed, run.trainer, run.task, optimizer=True)
            check_callbacks(resumed, run.trainer.callbacks)
        except ValueError as error:
            return str(error)
        return ""

    refused = r".*last\.ckpt (holds no training state to go on from|does not fit).*"
    assert not problem(content)
    for key, value in CHANGES:
        place = key.format(part=part, kept=kept)
        found = problem(changed(content, place, value))
        assert re.fullmatch(refused, found), (place, value)
    run.fit()


def test_what_other_versions_count_is_left_to_them(start: Start) -> None:
    start(*SMALL, "trainer.max_steps=1", "run_dir=runs/a").fit()
    path = Path("runs/a/checkpoints/last.ckpt").resolve()
    content = checkpoint.read(path).content
    content["pytorch-lightning_version"] = "2.6.0"
    del content["loops"]["fit_loop"]["epoch_loop.scheduler_progress"]
    content["loops"]["fit_loop"]["more"] = {"ready": 3}
    checkpoint.save(content, path)
    start(*SMALL, "trainer.max_steps=6", "ckpt=runs/a")


def test_weights_that_are_not_finite_are_not_gone_on_from(start: Start) -> None:
    words = [*SMALL, "trainer.max_steps=2"]
    start(*words, "trainer.val_every=1", "run_dir=runs/a").fit()
    path = Path("runs/a/checkpoints/last.ckpt").resolve()
    content = checkpoint.read(path).content
    content["state_dict"]["model.head.weight"][0, 0] = math.nan
    checkpoint.save(content, path)
    message = r"its weights are not finite \(model.head.weight\).*; to go on from the one before it: ckpt=.*step=000001"
    with pytest.raises(ValueError, match=message):
        start(*words, "ckpt=runs/a")
    run = start(*words, "ckpt=auto")
    assert run.resumed is not None
    assert run.resumed.content["global_step"] == 1
