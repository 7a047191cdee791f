import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from performer_lm.training.loggers import record
from performer_lm.training.loggers.record import MetricsLogger, merge_steps, read_metrics
from performer_lm.training.run import Run


def test_the_record_is_appended_and_the_table_derived(tmp_path: Path) -> None:
    logger = MetricsLogger(folder=tmp_path)
    logger.log_metrics({"train/loss": 3.0, "epoch": 0}, step=1)
    logger.log_metrics({"epoch": 0}, step=1)
    logger.log_metrics({"val/bpb": 2.5}, step=2)
    logger.log_metrics({"train/loss": 2.0}, step=2)
    logger.derive()
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
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_record_is_cut_to_its_step(tmp_path: Path) -> None:
    logger = MetricsLogger(folder=tmp_path)
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": float(step)}, step=step)
    whole = logger.record.read_text()
    for cut in range(len(whole) // 3 * 2, len(whole)):  # a kill in the middle of the last line, wherever
        logger.record.write_text(whole[:cut])
        logger.begin(tmp_path, step=2)
        logger.log_metrics({"train/loss": 3.5}, step=3)
        assert [(row["step"], row["train/loss"]) for row in read_metrics(logger.record)] == [(1, 1), (2, 2), (3, 3.5)]


def test_a_torn_line_costs_no_other(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "a": 1.0}',
        '{"step": 2, "a',
        '{"step": 3, "a": 3.0}',
        "7",
        '{"a": 1.0}',
        '{"step": 4, "a": 4.0}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3, 4]


ODD = [
    b"not json",
    b"[1, 2]",
    b'"text"',
    b"null",
    b"7",
    b'{"a": 1.0}',
    b'{"step": "3", "a": 1.0}',
    b'{"step": null, "a": 1.0}',
    b'{"step": [3], "a": 1.0}',
    b'{"step": {}, "a": 1.0}',
    b'{"step": true, "a": 1.0}',
    b'{"step": NaN, "a": 1.0}',
    b'{"step": Infinity, "a": 1.0}',
    b'{"step": 1e999, "a": 1.0}',
    b'{"step": ' + b"9" * 400 + b"}",
    b'{"step": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"step": ' * 50_000,
    bytes(range(256)),
    b"\0" * 1000,
    b"",
    "{\u2028}".encode(),
]
WITHIN = [b'"b"', b"[1]", b"{}", b"true", b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"null"]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_lines_that_are_none_of_a_record_cost_nothing(tmp_path: Path, place: int) -> None:
    logger = MetricsLogger(folder=tmp_path)
    good = [f'{{"step": {step}, "train/loss": {step}.5}}'.encode() for step in (1, 2, 3, 4)]
    lines = [*good[:place], *ODD, *good[place:]]
    logger.record.write_bytes(b"\n".join(lines) + b"\n")
    assert read_metrics(logger.record) == [{"step": step, "train/loss": step + 0.5} for step in (1, 2, 3, 4)]
    logger.derive()
    assert (tmp_path / "metrics.png").exists()
    logger.begin(tmp_path, step=3)
    assert logger.record.read_bytes() == b"\n".join(good[:3]) + b"\n"


def test_values_that_are_no_numbers_are_left_out_and_stand_in_the_record(tmp_path: Path) -> None:
    logger = MetricsLogger(folder=tmp_path)
    lines = [b'{"step": 1, "train/loss": 2.5, "val/bpb": ' + value + b"}\n" for value in WITHIN]
    logger.record.write_bytes(b"".join(lines))
    assert read_metrics(logger.record) == [{"step": 1, "train/loss": 2.5}] * len(lines)
    logger.derive()
    assert (tmp_path / "metrics.png").exists()
    logger.begin(tmp_path, step=1)
    assert logger.record.read_bytes() == b"".join(lines)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    logger = MetricsLogger(folder=tmp_path)
    logger.log_metrics({"a": float("nan"), "b": float("inf"), "c": 1.0}, step=1)
    assert json.loads(logger.record.read_text()) == {"step": 1, "a": None, "b": None, "c": 1.0}
    assert merge_steps(read_metrics(logger.record)) == [{"step": 1, "c": 1.0}]


def test_nothing_is_written_before_the_first_metric(tmp_path: Path) -> None:
    logger = MetricsLogger(folder=tmp_path / "run")
    logger.begin(tmp_path / "run", step=0)
    logger.derive()
    assert not (tmp_path / "run").exists()


def test_a_picture_or_a_table_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError("no memory\nat all")

    logger = MetricsLogger(folder=tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    monkeypatch.setattr(record, "draw_metrics", fail)
    monkeypatch.setattr(record, "write_csv", fail)
    logger.derive()
    assert caplog.messages == ["warning: metrics.csv could not be written: no memory",
                               "warning: metrics.png could not be written: no memory"]  # fmt: skip


def test_a_resumed_run_leaves_the_record_of_the_unbroken_one(start: Callable[..., Run]) -> None:
    common = ["trainer.max_steps=8", "trainer.val_every=3", "trainer.log_every=2", "trainer.accumulate_grad_batches=2"]
    start(*common, "run_dir=runs/whole").fit()
    part = start(*common, "run_dir=runs/part")
    part.trainer.callbacks.append(Break(at=5))
    with pytest.raises(RuntimeError, match="broken"):
        part.fit()
    assert Path("runs/part/metrics.csv").exists()
    start(*common, "ckpt=runs/part").fit()
    records = []
    for run in ("whole", "part"):
        rows = read_metrics(Path(f"runs/{run}/metrics.jsonl"))
        records.append([{k: v for k, v in row.items() if "per_second" not in k} for row in rows])
    assert records[0] == records[1]
    assert [row["step"] for row in records[0] if "val/bpb" in row] == [3, 6, 8]


class Break(Callback):
    def __init__(self, *, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("broken")
