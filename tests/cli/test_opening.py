from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from performer_lm.cli.opening import open_from

GOLDEN = Path(__file__).parents[1] / "golden" / "backends"


def test_a_checkpoint_opens_where_no_command_line_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # as in a script that composes a config itself
    path = GOLDEN / "favor.ckpt"
    opened = open_from(OmegaConf.create({"ckpt": str(path), "device": "cpu"}))
    assert opened.model.decodes
    assert opened.checkpoint.path == path
