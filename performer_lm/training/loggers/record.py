"""The record of a run: `metrics.jsonl`, appended line by line; `metrics.csv` and `metrics.png` derive from it."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from performer_lm.training.loggers.base import RunLogger
from performer_lm.training.plot import draw_metrics
from performer_lm.training.report import spared
from performer_lm.writing import append_text, replace_text, write_csv

Row = dict[str, float]


class MetricsLogger(Logger, RunLogger):
    """Append every logged metric to `metrics.jsonl` as `{"step": 10, "train/loss": 3.2, ...}`.

    A resumed run goes on in the same file, cut back to the step it restores: no line is lost or doubled. Whenever this
    is killed, the file holds all lines but perhaps the end of the last one.
    """

    def __init__(self, *, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def record(self) -> Path:
        return self.folder / "metrics.jsonl"

    @rank_zero_only
    def begin(self, folder: Path, *, step: int) -> None:
        """Drop lines after `step`, and lines that are no rows of metrics."""
        if self.record.exists():
            kept = [line for line, row in _read_lines(self.record) if row["step"] <= step]
            replace_text(self.record, "".join(kept))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep nothing: `config.yaml` holds the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line; a number that is not finite, which JSON does not know, becomes null."""
        row = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if row:
            known = {name: value if math.isfinite(value) else None for name, value in row.items()}
            append_text(self.record, json.dumps({"step": step, **known}, allow_nan=False) + "\n")

    def derive(self) -> None:
        """Make `metrics.csv`, with one row per step and one column per metric, and draw `metrics.png`."""
        with spared("metrics.csv"):
            rows = merge_steps(read_metrics(self.record)) if self.record.exists() else []
            if not rows:
                return
            columns = ["step", *sorted({name for row in rows for name in row} - {"step"})]
            write_csv(self.folder / "metrics.csv", columns, ([row.get(name, "") for name in columns] for row in rows))
        with spared("metrics.png"):
            draw_metrics(rows, self.folder / "metrics.png", title=str(self.folder))


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a `metrics.jsonl`; metrics that are null are left out, and lines that are none of a record."""
    return [row for _, row in _read_lines(path)]


def _read_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each line that is a row of numbers, as it stands and as the row."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # cut short by a kill, or not ours
                continue
            if isinstance(row, dict) and _is_number(row.get("step")):
                yield line.rstrip("\n") + "\n", {name: value for name, value in row.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    """Return True for a finite number that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def merge_steps(rows: list[Row]) -> list[Row]:
    """Return one row per step, in order, from rows of which several may share a step."""
    merged: dict[float, Row] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]
