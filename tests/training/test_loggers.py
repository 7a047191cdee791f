import csv
from pathlib import Path

import pytest

from performer_lm.training import loggers
from performer_lm.training.loggers import MetricsLogger, read_metrics, tensorboard_logger, wandb_logger


def test_the_record_is_appended_and_the_table_derived(tmp_path: Path) -> None:
    logger = MetricsLogger(path=str(tmp_path))
    logger.log_metrics({"train/loss": 3.0, "epoch": 0}, step=1)
    logger.log_metrics({"epoch": 0}, step=1)
    logger.log_metrics({"val/bpb": 2.5}, step=2)
    logger.log_metrics({"train/loss": 2.0}, step=2)
    logger.finalize("success")
    assert read_metrics(logger.record) == [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "val/bpb": 2.5},
        {"step": 2, "train/loss": 2.0},
    ]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "train/loss": "3.0", "val/bpb": ""},
        {"step": "2", "train/loss": "2.0", "val/bpb": "2.5"},
    ]


def test_a_resumed_record_is_cut_to_its_step(tmp_path: Path) -> None:
    logger = MetricsLogger(path=str(tmp_path))
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": float(step)}, step=step)
    with logger.record.open("a") as file:
        file.write('{"step": 4, "train/l')  # a kill in the middle of a line
    logger.cut_to(2)
    logger.log_metrics({"train/loss": 3.5}, step=3)
    assert [(row["step"], row["train/loss"]) for row in read_metrics(logger.record)] == [(1, 1.0), (2, 2.0), (3, 3.5)]


def test_nothing_is_written_before_the_first_metric(tmp_path: Path) -> None:
    logger = MetricsLogger(path=str(tmp_path / "run"))
    logger.cut_to(0)
    logger.finalize("success")
    assert not (tmp_path / "run").exists()


def test_wandb_mode_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logger\.wandb\.mode must be online, offline or disabled, got 'onlin'"):
        wandb_logger(project="p", save_dir=str(tmp_path), mode="onlin")


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr(loggers, "TensorBoardLogger", refuse)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tensorboard\]'"):
        tensorboard_logger(save_dir=str(tmp_path))
