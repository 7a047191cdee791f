"""The record of a run: `metrics.jsonl`, appended line by line, from which `metrics.csv` is derived at the end."""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsLogger(Logger):
    """Append every logged metric to `metrics.jsonl` as `{"step": 10, "train/loss": 3.2, ...}`.

    A resumed run goes on in the same file, cut back to the step it restores: no line is lost or doubled.
    """

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.folder = Path(path)

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
    def cut_to(self, step: int) -> None:
        """Drop what was logged after `step`, and a last line that a kill cut short."""
        if self.record.exists():
            kept = [row for row in read_metrics(self.record) if row["step"] <= step]
            temporary = self.record.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(temporary, self.record)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep nothing: `config.yaml` holds the configuration."""
        del params, args, kwargs

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        row = {"step": step, **{name: float(value) for name, value in metrics.items() if name != "epoch"}}
        if len(row) > 1:
            with self.record.open("a") as file:
                file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Derive `metrics.csv`: one row per step, one column per metric."""
        del status
        if not self.record.exists():
            return
        merged: dict[int, dict[str, float]] = {}
        for row in read_metrics(self.record):
            merged.setdefault(int(row["step"]), {}).update(row)
        columns = ["step", *sorted({name for row in merged.values() for name in row} - {"step"})]
        with (self.folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(merged[step] for step in sorted(merged))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a `metrics.jsonl`, without a last line that was cut short."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def tensorboard_logger(*, save_dir: str) -> TensorBoardLogger:
    """Build the TensorBoard logger, which writes below `<save_dir>/tensorboard`.

    Raises:
        ValueError: where TensorBoard is not installed.
    """
    try:
        return TensorBoardLogger(save_dir, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise ValueError("logger=tensorboard needs TensorBoard: pip install -e '.[tensorboard]'") from error


def wandb_logger(*, project: str, save_dir: str, mode: str | None) -> WandbLogger:
    """Build the Weights & Biases logger; without a key and without `mode`, it records offline."""
    import wandb  # here, since it takes seconds to import

    has_key = bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.api.api_key)
    chosen = mode or os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    if chosen not in ("online", "offline", "disabled"):
        raise ValueError(f"logger.wandb.mode must be online, offline or disabled, got {chosen!r}")
    return WandbLogger(project=project, save_dir=save_dir, mode=chosen, settings=wandb.Settings(silent=True))
