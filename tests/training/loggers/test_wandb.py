import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from performer_lm.training.loggers.wandb import WeightsAndBiases
from performer_lm.training.run import Run


def test_the_mode_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logger\.wandb\.mode must be online, offline or disabled, got 'onlin'"):
        WeightsAndBiases(project="p", save_dir=str(tmp_path), mode="onlin", group=None, tags=None)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_the_id_of_its_folder(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        logger = WeightsAndBiases(project="p", save_dir=str(tmp_path), mode="disabled", group="g", tags=["a"])
        logger.begin(tmp_path, step=0)
        ids.append(logger.version)
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text().strip()
    other = WeightsAndBiases(project="p", save_dir=str(tmp_path / "other"), mode="disabled", group=None, tags=None)
    assert other.version != ids[0]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", [b"", b"../x", b"a b", b"a/b", b"\xff\xfe", b"x" * 10_000_000, b"a\nb"])
def test_what_is_no_id_is_not_taken_for_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wandb_id").write_bytes(content)
    logger = WeightsAndBiases(project="p", save_dir=str(tmp_path), mode="disabled", group=None, tags=None)
    assert re.fullmatch("[0-9a-f]{8}", str(logger.version))
    logger.begin(tmp_path, step=0)
    assert (tmp_path / "wandb_id").read_text() == f"{logger.version}\n"


@pytest.mark.slow
def test_it_logs_offline_without_a_key_and_keeps_no_secret(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    monkeypatch.setenv("MY_PASSWORD", "another_secret_of_mine")
    common = ["logger=[csv,wandb]", "logger.wandb.tags=[tried]"]
    start(*common, "run_dir=runs/a").fit()
    start(*common, "ckpt=runs/a", "trainer.max_steps=6").fit()
    first, second = sorted(Path("runs/a/wandb").glob("offline-run-*"))
    assert (
        first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == Path("runs/a/wandb_id").read_text().strip()
    )
    tables = [json.loads(path.read_text()) for path in first.rglob("*.table.json")]
    assert [table["columns"] for table in tables] == [["step", "prompt", "continuation"]] * 2
    assert sorted(table["data"][0][:2] for table in tables) == [[2, "def "], [4, "def "]]
    record = next(second.glob("*.wandb")).read_bytes()
    assert b"performer_lm.training.optim.muon" in record
    assert b"val/bpb" in record
    for path in Path("runs/a").rglob("*"):
        assert not path.is_file() or b"secret_of_mine" not in path.read_bytes(), path
