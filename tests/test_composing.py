"""The compositions of `composing.py`."""

import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    "words",
    [
        ["attn=hybrid", "attn.pattern=[favor,local]", "model.dim=32", "+new={a: 1}"],
        ["debug=fast", "callbacks=[default,ema]", "model=performer_seq2seq", "~callbacks.samples"],
    ],
    ids=" ".join,
)
def test_what_is_composed_again_is_what_hydra_composes(words: list[str], tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(CONFIGS, tmp_path / "configs"))  # of which nothing is kept
    found = []
    for folder in (elsewhere, CONFIGS, CONFIGS):
        with initialize_config_dir(str(folder), version_base="1.3"):
            cfg = compose("train", overrides=words, return_hydra_config=True)
        found.append(OmegaConf.to_yaml(cfg).replace(str(elsewhere), str(CONFIGS)))
        cfg.model, cfg.seed = {}, 7  # a change of one is none of the next
    assert found[0] == found[1] == found[2]
