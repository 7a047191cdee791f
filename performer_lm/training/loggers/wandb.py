"""Weights & Biases beside the run's own record."""

import os
import re
import secrets
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from performer_lm.training.loggers.base import RunLogger
from performer_lm.training.report import spared
from performer_lm.writing import read_start, replace_text

ID_FILE = "wandb_id"  # in the run folder: a resumed run goes on under it


class WeightsAndBiases(WandbLogger, RunLogger):
    """Log to Weights & Biases; without a key and without `mode`, offline: `wandb sync` sends that later.

    Recorded are metrics, samples as tables, and the config; no code, no git state, no console output.

    Args:
        project: where the run appears.
        save_dir: the run folder.
        mode: `online`, `offline` or `disabled`; None for the environment's WANDB_MODE, or else what the key allows.
        group: a name that the runs of one study share; None for none.
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
        known = _read_id(Path(save_dir) / ID_FILE)
        super().__init__(
            project=project,
            save_dir=save_dir,
            id=known or secrets.token_hex(4),
            mode=chosen,
            group=group,
            tags=list(tags or ()),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )

    @rank_zero_only
    def begin(self, folder: Path, *, step: int) -> None:
        """Keep the run's id; steps logged twice, before a kill and after it, stand over one another."""
        replace_text(folder / ID_FILE, f"{self.version}\n")

    @rank_zero_only
    def log_sample(self, prompt: str, continuation: str, *, step: int) -> None:
        row: list[Any] = [step, prompt, continuation]
        self.log_text("samples", columns=["step", "prompt", "continuation"], data=[row], step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, so that the next one of a sweep is a run of its own."""
        with spared("the end of the W&B run"):
            super().finalize(status)
            if self._experiment is not None:
                self._experiment.finish(exit_code=0 if status == "success" else 1)
                self._experiment = None


def _read_id(path: Path) -> str | None:
    """Return the id in a file, if that is one."""
    text = read_start(path, 100).decode(errors="replace").strip() if path.exists() else ""
    return text if re.fullmatch(r"[\w-]{1,64}", text, re.ASCII) else None
