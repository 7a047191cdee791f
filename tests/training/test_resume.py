import math
import shlex
from pathlib import Path

import pytest
import torch

from performer_lm.checkpoint import Checkpoint
from performer_lm.training.resume import best_score, check_resumed, keep_former_defaults, resume_command


def saved(**section: object) -> Checkpoint:
    return Checkpoint(Path("last.ckpt"), {"model": {}, "fingerprint": {}, "seed": 0, **section}, {}, {"global_step": 5})


def test_the_same_run_goes_on() -> None:
    check_resumed(saved(), {"model": {}, "fingerprint": {}, "seed": 0}, max_steps=5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"model": {"dim": 1}}, {"model": {"dim": 2}}, r"model\.dim was 1, is 2"),
        ({"model": {"a": {"b": 1}}}, {"model": {"a": {}}}, r"model\.a\.b was 1, is None"),
        ({"seed": 1}, {"seed": 2}, "seed was 1, is 2"),
        ({"fingerprint": {"corpus": "x"}, "seed": 1}, {"fingerprint": {"corpus": "y"}}, "corpus was .*; seed was"),
    ],
)
def test_another_run_is_refused_with_both_values(old: dict, new: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_resumed(saved(**old), {"model": {}, "fingerprint": {}, "seed": 0, **new}, max_steps=9)


def model_of(heads: int, local_heads: int | None, num_features: int) -> dict[str, object]:
    attn = {"_target_": "hybrid", "backends": {"favor": {"num_features": num_features}}}
    return {"heads": heads, "local_heads": local_heads, "attn": attn}


@pytest.mark.parametrize(
    ("saved_by", "typed", "expected"),
    [
        ((8, 0, 64), [], (8, 0, 64)),
        ((8, 0, 64), ["model", "attn", "attn.seed"], (8, 0, 64)),
        ((8, 0, 64), ["model.heads", "attn.backends.favor.num_features"], (4, 0, 128)),
        ((16, 2, 32), [], (4, None, 128)),  # never a default, so another run
    ],
)
def test_what_was_not_typed_is_the_default_that_the_run_began_with(
    saved_by: tuple[int, int, int], typed: list[str], expected: tuple[int, int | None, int]
) -> None:
    section = model_of(4, None, 128)
    keep_former_defaults(section, model_of(*saved_by), typed=typed)
    assert section == model_of(*expected)


def test_a_run_cannot_shrink() -> None:
    with pytest.raises(ValueError, match=r"max_steps \(4\) must be at least the step of last\.ckpt \(5\)"):
        check_resumed(saved(), {"model": {}, "fingerprint": {}, "seed": 0}, max_steps=4)


def test_changes_are_allowed_by_name_alone_and_told() -> None:
    old = saved(model={"dim": 1, "depth": 2}, training={"optimizer": {"lr": 1.0}})
    new = {"model": {"dim": 1, "depth": 3}, "fingerprint": {}, "seed": 0, "training": {"optimizer": {"lr": 2.0}}}
    told = check_resumed(old, new, max_steps=5, allow=["model", "optimizer.lr"])
    assert told == [
        "changed since the checkpoint: model.depth was 2, is 3",
        "changed since the checkpoint: optimizer.lr was 1.0, is 2.0",
    ]
    with pytest.raises(ValueError, match=r"model\.depth was 2, is 3 \(resume\.allow="):
        check_resumed(old, new, max_steps=5, allow=["optimizer.lr", "model.dep"])


def test_how_much_is_worked_on_at_once_makes_no_other_run() -> None:
    old = saved(model={"attn": {"chunk_size": 64, "backends": {"favor": {"chunk_size": 64}}}})
    new = {"attn": {"chunk_size": None, "backends": {"favor": {"chunk_size": 128}}}}
    told = check_resumed(old, {"model": new, "fingerprint": {}, "seed": 0}, max_steps=5)
    assert told == [
        "changed since the checkpoint: model.attn.backends.favor.chunk_size was 64, is 128",
        "changed since the checkpoint: model.attn.chunk_size was 64, is None",
    ]


def test_options_that_a_file_does_not_know_were_off() -> None:
    old = saved(model={"dim": 1})
    new = {"model": {"dim": 1, "shift": False, "extra": None}, "fingerprint": {}, "seed": 0, "training": {"a": {}}}
    assert check_resumed(old, new, max_steps=5) == []
    with pytest.raises(ValueError, match=r"model\.shift was None, is True"):
        check_resumed(old, {**new, "model": {"dim": 1, "shift": True}}, max_steps=5)


def test_an_option_that_this_version_no_longer_names_makes_no_other_run_where_it_was_off() -> None:
    new = {"model": {"attn": {"backends": {"flash": {}}}}, "fingerprint": {}, "seed": 0}
    check_resumed(saved(model={"attn": {"backends": {"flash": {"dropout": 0.0}}}}), new, max_steps=5)
    with pytest.raises(ValueError, match=r"flash\.dropout was 0\.1, is None"):
        check_resumed(saved(model={"attn": {"backends": {"flash": {"dropout": 0.1}}}}), new, max_steps=5)


def test_the_command_keeps_what_was_typed_and_quotes_for_the_shell() -> None:
    typed = ["attn=flash", "data.path=my text.txt", "ckpt=old", "run_dir=elsewhere", "trainer.max_steps=10"]
    stopped = resume_command(typed, folder=Path("runs/a"), step=4, max_steps=10)
    wanted = ["python", "train.py", "attn=flash", "data.path=my text.txt"]
    assert shlex.split(stopped) == [*wanted, "trainer.max_steps=10", "ckpt=runs/a"]
    finished = resume_command(typed, folder=Path("runs/a"), step=10, max_steps=10)
    assert shlex.split(finished) == [*wanted, "ckpt=runs/a", "trainer.max_steps=20"]


def test_the_best_score_is_the_lowest_or_nan() -> None:
    content = {"callbacks": {"a": {"best_model_score": None}, "b": {"best_model_score": torch.tensor(2.0)}, "c": 1}}
    assert best_score(Checkpoint(Path(), {}, {}, content)) == 2.0
    assert math.isnan(best_score(Checkpoint(Path(), {}, {}, {"callbacks": {}})))
