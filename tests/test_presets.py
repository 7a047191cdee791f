"""Every file of configs/experiment, configs/debug and configs/sweep runs, shortened to two steps (RELIABILITY: C23)."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from performer_lm.training.loggers import record

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = ("experiment", "debug", "sweep")
PRESETS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
SHORT = {
    "trainer.max_steps": 2,
    "trainer.val_every": 2,
    "trainer.log_every": 1,
    "data.batch_size": 2,
    "data.validation_bytes": 2048,
}
TEXT = {"data": "files", "data.path": "text.txt", "data.context": 256}  # in place of larger corpora
Invoke = Callable[..., tuple[int, str, str]]


def shortened(preset: str) -> tuple[list[str], DictConfig]:
    """Return the command line of a short run with a preset, and the preset's config as it stands."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=[preset], return_hydra_config=True)
    short = SHORT if "synthetic" in cfg.data["_target_"] else {**SHORT, **TEXT}
    small = ["debug=fast"] if preset.startswith("sweep=") else []  # several jobs
    if cfg.callbacks.get("samples"):
        short = {**short, "callbacks.samples.max_new_tokens": 2}
    return [preset, *small, *(f"{key}={value}" for key, value in short.items())], cfg


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(preset: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "draw_metrics", lambda *arguments, **options: None)
    Path("text.txt").write_text("".join(f"line {index} says {index * 37 % 101}\n" for index in range(2000)))
    words, cfg = shortened(preset)
    if "teacher" in cfg.objective:
        assert invoke("debug=fast", "data=files", "data.path=text.txt", "attn=flash", "run_dir=runs/teacher")[0] == 0
        words += ["init=runs/teacher", "attn=favor"]
    swept = cfg.hydra.sweeper.get("params") or {}
    code, _, err = invoke(*(["-m"] if swept else []), *words, "run_dir=runs/a")
    assert code == 0, err
    if not swept:
        assert Path("runs/a/summary.json").exists()
        return
    with Path("runs/a/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["ended"] for row in rows] == ["done"] * len(rows)
    assert set(swept) <= {*rows[0]}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_says_how_to_run_it(preset: str) -> None:
    group, _, name = preset.partition("=")
    text = (CONFIGS / group / f"{name}.yaml").read_text()
    assert f"python train.py {'-m ' if group == 'sweep' else ''}{preset}" in text
