"""One training run, from its first step to its last file.

`prepare.py` makes a `Run` that is ready, `Run.fit` trains it. What it leaves lies in one folder (`folder.py`).
"""

import json
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from performer_lm.checkpoint import Checkpoint
from performer_lm.data.module import WindowData
from performer_lm.memory import peak_memory, reset_peak_memory, sizes_told
from performer_lm.training.callbacks.saving import Checkpoints
from performer_lm.training.callbacks.stopping import StopOnSignal, requeue
from performer_lm.training.callbacks.throughput import Throughput
from performer_lm.training.folder import RunFolder
from performer_lm.training.loggers.base import RunLogger
from performer_lm.training.loggers.record import MetricsLogger
from performer_lm.training.processes import started_processes
from performer_lm.training.report import card, open_log, point_latest, spared
from performer_lm.training.resume import best_score, resume_command
from performer_lm.training.task import LanguageModelTask
from performer_lm.writing import replace_text

log = logging.getLogger("performer_lm")


@dataclass(kw_only=True)
class Run:
    """A run that is ready to train."""

    cfg: DictConfig
    overrides: Sequence[str]
    run_folder: RunFolder
    resumed: Checkpoint | None
    data: WindowData
    task: LanguageModelTask
    trainer: Trainer
    throughput: Throughput
    saving: Checkpoints
    stop: StopOnSignal
    record: MetricsLogger
    console: Console
    notes: list[str] = field(default_factory=list)  # what there is to say about going on

    @property
    def folder(self) -> Path:
        return self.run_folder.path

    def fit(self) -> float:
        """Train to `trainer.max_steps`, and return the best validation bits per byte.

        Raises:
            KeyboardInterrupt: after Ctrl-C, with a checkpoint saved.
            SystemExit: 143 after SIGTERM (under SLURM also SIGUSR1), with a checkpoint saved.
        """
        try:
            if not self.trainer.is_global_zero:
                self._train()  # what is said and written, the first rank says and writes
                return self.saving.best
            self.run_folder.open(self.cfg)
            for logger in self.trainer.loggers:
                if isinstance(logger, RunLogger):  # a config may add Lightning's own
                    logger.begin(self.folder, step=self._first_step)
            with open_log(self.folder / "train.log", self.console):
                point_latest(self.folder)
                return self._fit_and_tell()
        finally:
            self.run_folder.release()

    def _fit_and_tell(self) -> float:
        for note in self.notes:
            log.warning("%s", note)
        start = self._first_step
        if self.resumed and start >= self.trainer.max_steps:
            log.info("%s has finished; to go on: %s", self.folder, self._resume_command())
            return best_score(self.resumed)
        log.info("run folder %s%s", self.folder, f", resumed at step {start}" if start else "")
        for logger in self.trainer.loggers:
            logger.log_hyperparams(plain(self.cfg))
        summary: dict[str, Any] = {}
        try:
            self._train()
            if self.stop.stopped is None:
                summary = self._summarize()
                replace_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        finally:
            self.record.derive()
        if self.stop.stopped is None:
            with spared("the card that closes a run"):
                prompt = self.data.prompt if self.task.model.decodes else None
                log.info("%s", card(summary, resume=self._resume_command(), prompt=prompt))
            return self.saving.best
        log.info("stopped by %s; saved %s", signal.Signals(self.stop.stopped).name, self.saving.last)
        log.info("resume with: %s", self._resume_command())
        if self.stop.stopped == signal.SIGUSR1:
            requeue()
        if self.stop.stopped == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(143)

    def _train(self) -> None:
        device, data = self.trainer.strategy.root_device, self.cfg.data
        reset_peak_memory(device)
        size = f"{self.data.share(self.trainer).micro_batch} x {data.context} tokens x width {self.cfg.model.dim}"
        told = sizes_told(device, micro_batch=size, vocabulary=self.task.model.head.out_features)
        with told, started_processes(self.trainer, self.overrides):
            self.trainer.fit(
                self.task,
                datamodule=self.data,
                ckpt_path=self.resumed.path if self.resumed else None,
                weights_only=True,
            )

    @property
    def _first_step(self) -> int:
        return int(self.resumed.content["global_step"]) if self.resumed else 0

    def _summarize(self) -> dict[str, Any]:
        steps, metrics = self.trainer.global_step, self.trainer.callback_metrics
        return {
            "steps": steps,
            "tokens": steps * self.throughput.run.tokens_per_step,
            "tokens_per_second": round(self.throughput.tokens_per_second, 1),
            "peak_memory": peak_memory(self.trainer.strategy.root_device),
            "best_val_bpb": self.saving.best,
            "last_val_bpb": float(metrics["val/bpb"]),
            **({"last_val_accuracy": float(metrics["val/accuracy"])} if "val/accuracy" in metrics else {}),
            "parameters": sum(parameter.numel() for parameter in self.task.model.parameters()),
            "folder": str(self.folder),
            "overrides": list(self.overrides),
        }

    def _resume_command(self) -> str:
        step = max(self.trainer.global_step, self._first_step)
        return resume_command(self.overrides, folder=self.folder, step=step, max_steps=self.trainer.max_steps)


def plain(section: DictConfig) -> dict[str, Any]:
    """Return a section of a config as plain data, interpolations resolved."""
    return OmegaConf.to_container(section, resolve=True)  # type: ignore[return-value]
