"""The record of a run: `metrics.jsonl`, appended line by line; `metrics.csv` and `metrics.png` derive from it."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from performer_lm import checkpoint
from performer_lm.training.loggers.base import RunLogger
from performer_lm.training.plot import draw_metrics

Row = dict[str, float]


class MetricsLogger(Logger, RunLogger):
    """Append every logged metric to `metrics.jsonl` as `{"step": 10, "train/loss": 3.2, ...}`.

    A resumed run goes on in the same file, cut back to the step it restores: no line is lost or doubled. Whenever this
    is killed, the file holds all lines but perhaps the end of the last one.

    Args:
        folder: the run's.
    """

    def __init__(self, *, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def name(self) -> str:
        """Return the logger's name."""
        return "metrics"

    @property
    def version(self) -> str:
        """Return an empty version: all of a run lies in one folder."""
        return ""

    @property
    def record(self) -> Path:
        """Return the file that the metrics are appended to."""
        return self.folder / "metrics.jsonl"

    @rank_zero_only
    def begin(self, folder: Path, *, step: int) -> None:
        """Drop what was logged after `step`, and a last line that a kill cut short."""
        if self.record.exists():
            kept = [row for row in read_metrics(self.record) if row["step"] <= step]
            checkpoint.replace_text(self.record, "".join(map(_line, kept)))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep nothing: `config.yaml` holds the configuration."""
        del params, args, kwargs

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line; a number that is not finite, which JSON does not know, becomes null."""
        row = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if row:
            with self.record.open("a") as file:
                file.write(_line({"step": step, **{k: v if math.isfinite(v) else None for k, v in row.items()}}))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Derive `metrics.csv`, with one row per step and one column per metric, and draw `metrics.png`."""
        del status
        rows = merge_steps(read_metrics(self.record)) if self.record.exists() else []
        if rows:
            columns = ["step", *sorted({name for row in rows for name in row} - {"step"})]
            with (self.folder / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            draw_metrics(rows, self.folder / "metrics.png", title=str(self.folder))


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a `metrics.jsonl`, without lines that a kill cut short; metrics that are null are left out."""
    rows: list[Row] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def merge_steps(rows: list[Row]) -> list[Row]:
    """Return one row per step, in order, from rows of which several may share a step."""
    merged: dict[float, Row] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _line(row: Mapping[str, float | None]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
