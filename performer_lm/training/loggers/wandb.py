"""Weights & Biases beside the run's own record."""

import os
import secrets
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from performer_lm.training.loggers.base import RunLogger

ID_FILE = "wandb_id"  # in the run folder: a resumed run goes on under it


class WeightsAndBiases(WandbLogger, RunLogger):
    """Log to Weights & Biases; without a key and without `mode`, offline: `wandb sync` sends that later.

    What is recorded: metrics, samples as tables, and the config. No code, no git state, no console output.

    Args:
        project: where the run appears.
        save_dir: the run folder.
        mode: `online`, `offline` or `disabled`; None for the environment's WANDB_MODE, or else what the key allows.
        group: what the runs of one study share; None for none.
        tags: of the run.
    """

    def __init__(
        self, *, project: str, save_dir: str, mode: str | None, group: str | None, tags: list[str] | None
    ) -> None:
        import wandb  # here, since it takes seconds to import

        has_key = bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.api.api_key)
        chosen = mode or os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        if chosen not in ("online", "offline", "disabled"):
            raise ValueError(f"logger.wandb.mode must be online, offline or disabled, got {chosen!r}")
        known = Path(save_dir) / ID_FILE
        super().__init__(
            project=project,
            save_dir=save_dir,
            id=known.read_text().strip() if known.exists() else secrets.token_hex(4),
            mode=chosen,
            group=group,
            tags=list(tags or ()),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )

    @rank_zero_only
    def begin(self, folder: Path, *, step: int) -> None:
        """Keep the run's id; steps logged twice, before a kill and after it, stand over one another."""
        (folder / ID_FILE).write_text(f"{self.version}\n")

    @rank_zero_only
    def log_sample(self, prompt: str, continuation: str, *, step: int) -> None:
        """Log a table of one row."""
        row: list[Any] = [step, prompt, continuation]
        self.log_text("samples", columns=["step", "prompt", "continuation"], data=[row], step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, so that the next one of a sweep is a run of its own."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None
