"""A run that goes on with the defaults of an earlier version says so wherever its config is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from performer_lm.training.run import Run

Start = Callable[..., Run]
FORMER = ["attn.num_features=64", "model.heads=8", "model.local_heads=0"]  # none is a default of debug=fast today
SEQ2SEQ = ["model=performer_seq2seq", "objective=seq2seq", "debug=[]", "data.batch_size=4", "data.context=64"]
SEQ2SEQ += [
    "trainer.max_steps=4",
    "trainer.val_every=2",
    "data.validation_bytes=4096",
    "trainer.log_every=1",
    "model.dim=32",
]


def values_of(section: Any, name: str) -> list[Any]:
    """Return all values of a name in plain data, whatever holds them."""
    if not isinstance(section, dict):
        return []
    return [value for key, value in section.items() if key == name] + [
        value for each in section.values() for value in values_of(each, name)
    ]


def begun(run: Run) -> Any:
    """Return the config that a run writes as it begins, and let its folder go."""
    run.run_folder.open(run.cfg)
    run.run_folder.release()
    return OmegaConf.to_container(OmegaConf.load(run.folder / "config.yaml"))


@pytest.mark.parametrize(
    ("model", "began", "ckpt"),
    [([], FORMER, "ckpt=runs/a"), (SEQ2SEQ, FORMER[:1], "ckpt=auto")],
    ids=["decoder", "seq2seq"],
)
def test_the_config_of_a_resumed_run_says_what_runs(
    start: Start, model: list[str], began: list[str], ckpt: str
) -> None:
    start(*model, *began, "run_dir=runs/a").fit()
    run = start(*model, ckpt, "trainer.max_steps=5")
    assert run.folder.resolve() == Path("runs/a").resolve()
    config = begun(run)
    assert {*values_of(config["model"], "num_features")} == {config["attn"]["num_features"]} == {64}
    for name in ("heads", "local_heads", "num_features"):
        assert values_of(config["model"], name) == values_of(run.task.section["model"], name)


def test_what_was_typed_stands_in_the_config_and_damage_starts_nothing_over(start: Start) -> None:
    start(*FORMER, "run_dir=runs/a").fit()
    with pytest.raises(ValueError, match="num_features was 64, is 32"):
        start("attn.num_features=32", "ckpt=runs/a")
    config = begun(start("attn.num_features=32", "ckpt=runs/a", "resume.allow=[model.attn]", "trainer.max_steps=5"))
    assert (config["attn"]["num_features"], config["model"]["attn"]["num_features"]) == (32, 32)
    assert config["model"]["heads"] == 8
    begun(start("ckpt=runs/a", "trainer.max_steps=5"))
    for path in Path("runs/a/checkpoints").glob("step=*.ckpt"):
        path.write_bytes(b"spoilt")
    with pytest.raises(ValueError, match="no checkpoint of runs/a is whole"):
        start("ckpt=auto")
    other = start("ckpt=auto", "attn.num_features=32")  # which never was a default
    assert other.resumed is None
    other.run_folder.release()


@pytest.mark.parametrize("began", [[], ["attn/features=hyperbolic", "attn.num_features=16"]], ids=["plain", "typed"])
@pytest.mark.parametrize("ckpt", ["ckpt=runs/a", "ckpt=auto"])
def test_a_run_that_began_with_the_former_attention_goes_on_with_it(start: Start, began: list[str], ckpt: str) -> None:
    start("attn=favor", *began, "run_dir=runs/a").fit()
    run = start(*began, ckpt, "trainer.max_steps=5")
    assert run.folder.resolve() == Path("runs/a").resolve()
    config = begun(run)
    assert config["attn"] == config["model"]["attn"] == run.task.section["model"]["attn"]
    assert config["attn"]["_target_"].endswith("FavorAttention")
    run.fit()
    assert "attn=favor, the default of earlier versions" in Path("runs/a/train.log").read_text()


def test_other_attention_than_the_former_and_the_default_has_to_be_typed(start: Start) -> None:
    start("attn=favor", "attn/features=hyperbolic", "run_dir=runs/a").fit()
    with pytest.raises(ValueError, match="antithetic was True, is False"):
        start("ckpt=runs/a")
    with pytest.raises(ValueError, match=r"_target_ was '.*FavorAttention', is '.*DeltaAttention'"):
        start("attn=delta", "ckpt=runs/a")
    with pytest.raises(ValueError, match="num_features was 128, is 32"):
        start("attn/features=hyperbolic", "attn.num_features=32", "ckpt=runs/a")
    run = start("ckpt=auto")
    assert run.resumed is None
    run.run_folder.release()
