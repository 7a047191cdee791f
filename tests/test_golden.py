"""What must not change unnoticed: files of earlier versions, first losses, and the names that users type."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from performer_lm import checkpoint
from performer_lm.training.loggers.record import read_metrics

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = ["debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes", "optimizer=adamw"]
TINY += ["trainer.accelerator=cpu"]
Invoke = Callable[..., tuple[int, str, str]]


def test_a_checkpoint_of_format_1_opens_and_goes_on_for_ever(invoke: Invoke, text: None) -> None:
    folder = Path("runs/old/checkpoints")
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "format1.ckpt", folder / "last.ckpt")
    model, tokenizer = checkpoint.open_model(checkpoint.read(folder / "last.ckpt"))
    assert tokenizer.decode(tokenizer.encode("def main(")) == "def main("
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000
    sizes = ["model.dim=16", "model.depth=1", "model.heads=2"]
    code, out, err = invoke(*TINY, *sizes, "ckpt=runs/old", "trainer.max_steps=6")
    assert code == 0, err
    assert "resumed at step 4" in out


spec = importlib.util.spec_from_file_location("record", GOLDEN / "record.py")
assert spec is not None
assert spec.loader is not None
record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record)
BACKENDS: dict[str, dict[str, list[float]]] = json.loads((GOLDEN / "backends.json").read_text())


def test_every_backend_and_every_feature_map_has_a_golden_checkpoint() -> None:
    words = " ".join(word for case in record.CASES.values() for word in case)
    named = {path.stem for path in (ROOT / "configs/attn").rglob("*.yaml") if not path.stem.startswith("_")}
    inside = {"positive": "favor", "generalized": "relu", "identity": "linear"}  # the features that a backend brings
    missing = {name for name in named - {"trig"} if f"={inside.get(name, name)}" not in words}
    assert not missing, f"add them to {record.__file__} and run it"
    assert record.CASES.keys() == BACKENDS.keys()


@pytest.mark.parametrize("case", record.CASES)
def test_a_golden_checkpoint_gives_the_logits_on_record(case: str) -> None:
    torch.testing.assert_close(
        torch.tensor(record.logits_of(GOLDEN / "backends" / f"{case}.ckpt")),
        torch.tensor(BACKENDS[case]["logits"]),
        atol=2e-6,
        rtol=2e-6,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", record.CASES)
def test_a_run_resumed_from_a_golden_checkpoint_has_the_losses_on_record(invoke: Invoke, case: str) -> None:
    folder = Path("run/checkpoints")
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "backends" / f"{case}.ckpt", folder / "last.ckpt")
    record.write_text(Path("text.txt"))
    code, out, err = invoke(*record.RUN, *record.CASES[case], "ckpt=run")
    assert code == 0, err
    assert "resumed at step 4" in out
    assert record.losses_of(Path("run")) == pytest.approx(BACKENDS[case]["losses"], rel=1e-5)


STACKS = [(model, attn) for attn in ("favor", "flash", "exact", "linear") for model in ("performer", "transformer")]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "attn"), [*STACKS, ("performer_classic", "favor")])
def test_the_first_20_losses_are_those_on_record(invoke: Invoke, text: None, model: str, attn: str) -> None:
    words = [f"model={model}", f"attn={attn}", "trainer.max_steps=20", "trainer.val_every=20", "trainer.log_every=1"]
    words += ["model.local.window=32"]  # of performer_classic's local heads, within the context
    words += ["attn.num_features=64"] * (attn == "favor")  # the default when they were recorded
    code, _, err = invoke(*TINY, *words, "run_dir=runs/a", "~callbacks.samples")
    assert code == 0, err
    found = [row["train/loss"] for row in read_metrics(Path("runs/a/metrics.jsonl")) if "train/loss" in row]
    known: dict[str, Any] = json.loads((GOLDEN / "losses.json").read_text())
    assert found == pytest.approx(known[f"{model} {attn}"], rel=1e-4), f"losses changed; now: {found}"


def keys(node: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for name in node:
        value = None if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name) else node[name]
        key = f"{prefix}{name}"
        found += keys(value, f"{key}.") if isinstance(value, DictConfig) and value else [key]
    return found


def test_the_keys_that_users_type_are_those_on_record() -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = [key for attn in ("favor", "delta") for key in keys(compose("train", overrides=[f"attn={attn}"]))]
    found = sorted({key for key in composed if not key.endswith(("_target_", "_partial_", "_convert_"))})
    record = GOLDEN / "keys.txt"
    known = record.read_text().splitlines()
    gone, new = sorted({*known} - {*found}), sorted({*found} - {*known})
    assert known == found, f"keys gone: {gone}; new: {new}; where that is meant, write it into tests/golden/keys.txt"


CHOICES = sorted(
    str(path.relative_to(ROOT / "configs").with_suffix(""))
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent != ROOT / "configs" and not path.stem.startswith("_")
)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice: str) -> None:
    group, _, name = choice.rpartition("/")
    above = {"attn/features": ["attn=favor"]}.get(group, [])
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        try:
            cfg = compose("train", overrides=[*above, f"{group}={name}"])
        except ConfigCompositionException:  # a group that the default does without
            cfg = compose("train", overrides=[*above, f"+{group}={name}"])
    assert cfg


@pytest.mark.slow
def test_auto_goes_on_from_a_run_that_began_with_earlier_defaults(invoke: Invoke) -> None:
    folder = Path("runs/old/checkpoints")
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "backends" / "favor.ckpt", folder / "last.ckpt")
    record.write_text(Path("text.txt"))
    code, out, err = invoke(*record.RUN, *record.CASES["favor"], "ckpt=auto")
    assert code == 0, err
    assert "resumed at step 4" in out
