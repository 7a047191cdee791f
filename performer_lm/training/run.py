"""One training run, from its config to its last file.

`prepare` does all that a user can get wrong, cheapest first, and writes nothing before it has succeeded; `Run.fit`
trains. A run lies in one folder:

    config.yaml  train.log  metrics.{jsonl,csv,png}  samples.txt  summary.json  checkpoints/{best,last}.ckpt
"""

import json
import logging
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from performer_lm import checkpoint
from performer_lm.attention.local import LocalAttention
from performer_lm.checkpoint import Checkpoint
from performer_lm.data.module import TextData
from performer_lm.language_model import LanguageModel
from performer_lm.training.callbacks.base import RunCallback, Surroundings
from performer_lm.training.callbacks.ending import FinalValidation, StopOnSignal
from performer_lm.training.callbacks.guard import NonFiniteGuard
from performer_lm.training.callbacks.learning_rates import LearningRates
from performer_lm.training.callbacks.progress import ProgressReport
from performer_lm.training.callbacks.redraw import Redraw
from performer_lm.training.callbacks.saving import checkpoints
from performer_lm.training.callbacks.summary import ModelSummary
from performer_lm.training.callbacks.throughput import Throughput
from performer_lm.training.loggers.base import RunLogger
from performer_lm.training.loggers.record import MetricsLogger
from performer_lm.training.optim import check_scaling, parameter_groups
from performer_lm.training.report import card, open_log, point_latest
from performer_lm.training.resume import best_score, check_resumed, resume_command
from performer_lm.training.task import LanguageModelTask

log = logging.getLogger("performer_lm")


@dataclass
class Run:
    """A run that is ready to train."""

    cfg: DictConfig
    overrides: Sequence[str]
    folder: Path
    resumed: Checkpoint | None
    data: TextData
    task: LanguageModelTask
    trainer: Trainer
    throughput: Throughput
    stop: StopOnSignal
    console: Console

    def fit(self) -> float:
        """Train to `trainer.max_steps`, and return the best validation bits per byte.

        Raises:
            KeyboardInterrupt: after Ctrl-C, with `last.ckpt` saved.
            SystemExit: 143 after SIGTERM, with `last.ckpt` saved.
        """
        self._open_folder()
        with open_log(self.folder / "train.log", self.console):
            if self.resumed and self.resumed.content["global_step"] >= self.trainer.max_steps:
                log.info("%s has finished; to go on: %s", self.folder, self._resume_command())
                return best_score(self.resumed)
            self._train()
            if self.stop.received is None:
                return self._close()
            log.info("stopped by %s; saved %s", signal.Signals(self.stop.received).name, self.stop.path)
            log.info("resume with: %s", self._resume_command())
        if self.stop.received == signal.SIGTERM:
            raise SystemExit(143)
        raise KeyboardInterrupt

    def _train(self) -> None:
        start = self.resumed.content["global_step"] if self.resumed else 0
        log.info("run folder %s%s", self.folder, f", resumed at step {start}" if start else "")
        for logger in self.trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(self.cfg, resolve=True))  # type: ignore[arg-type]
        self.trainer.fit(
            self.task,
            datamodule=self.data,
            ckpt_path=self.resumed.path if self.resumed else None,
            weights_only=True,
        )

    def _open_folder(self) -> None:
        """Make the folder, keep the config in it and point `latest` to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.cfg, self.folder / "config.yaml", resolve=True)
        step = self.resumed.content["global_step"] if self.resumed else 0
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):  # a config may add Lightning's own
                logger.begin(self.folder, step=step)
        point_latest(self.folder)

    def _close(self) -> float:
        """Write `summary.json` and print the card that closes a run."""
        steps = self.trainer.global_step
        best = float(cast(ModelCheckpoint, self.trainer.checkpoint_callbacks[0]).best_model_score or math.nan)
        summary: dict[str, Any] = {
            "steps": steps,
            "tokens": steps * self.throughput.run.tokens_per_step,
            "tokens_per_second": round(self.throughput.tokens_per_second, 1),
            "best_val_bpb": best,
            "last_val_bpb": float(self.trainer.callback_metrics["val/bpb"]),
            "parameters": sum(parameter.numel() for parameter in self.task.model.parameters()),
            "folder": str(self.folder),
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        log.info("%s", card(summary, resume=self._resume_command()))
        return best

    def _resume_command(self) -> str:
        step = max(self.trainer.global_step, self.resumed.content["global_step"] if self.resumed else 0)
        return resume_command(self.overrides, folder=self.folder, step=step, max_steps=self.trainer.max_steps)


def prepare(cfg: DictConfig, *, overrides: Sequence[str], job: int | None = None) -> Run:
    """Check and build everything that a run needs.

    Args:
        cfg: the composed training config.
        overrides: what the user typed, for the resume command.
        job: number of this job within a sweep.

    Raises:
        ValueError: for whatever the user has to put right, in one line.
    """
    resumed = checkpoint.read(checkpoint.find(cfg.ckpt, prefer=("last", "best"))) if cfg.ckpt else None
    folder = _choose_folder(Path(cfg.run_dir), resumed, job)
    cfg.run_dir = str(folder)
    console = Console(highlight=False)
    model_section: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[assignment]
    sketch = _sketch_model(model_section, context=cfg.data.context)

    data: TextData = instantiate(cfg.data)
    throughput = Throughput()
    stop = StopOnSignal(path=folder / "checkpoints" / "last.ckpt")
    chosen = instantiate(cfg.callbacks).values() if cfg.get("callbacks") else ()
    own: list[Callback] = [callback for callback in chosen if callback is not None]  # None: switched off
    callbacks = [
        ModelSummary(),
        Redraw(),
        NonFiniteGuard(),
        FinalValidation(),
        throughput,
        LearningRates(),
        ProgressReport(),
        *own,
        *checkpoints(folder / "checkpoints"),
        stop,
    ]
    added = instantiate(cfg.logger).values() if cfg.get("logger") else ()
    loggers = [MetricsLogger(folder=folder), *added]
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    objective, optimizer, schedule = (instantiate(cfg[name]) for name in ("objective", "optimizer", "schedule"))
    objective.check(sketch, separator=data.separator)
    check_scaling(optimizer(parameter_groups(nn.Linear(1, 1), head=nn.Identity())), precision=str(trainer.precision))
    schedule(trainer.max_steps)
    data.share(trainer)

    data.prepare()
    objective.adopt(data.tokenizer)
    surroundings = Surroundings(
        folder=folder,
        console=console,
        tokenizer=data.tokenizer,
        tokens_per_step=cfg.data.batch_size * cfg.data.context,
        log_every=cfg.trainer.log_every,
    )
    for callback in callbacks:
        if isinstance(callback, RunCallback):  # a config may add Lightning's own
            callback.join(surroundings)
    model_section["vocab_size"] = data.tokenizer.vocab_size
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    model: LanguageModel = checkpoint.build(model_section)
    section = checkpoint.describe(
        model=model_section, tokenizer=data.tokenizer, fingerprint=data.fingerprint(), seed=cfg.seed
    )
    if resumed:
        check_resumed(resumed, section, max_steps=trainer.max_steps)
    task = LanguageModelTask(
        model,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        byte_lengths=torch.from_numpy(data.tokenizer.byte_lengths()),
        section=section,
        log_every=cfg.trainer.log_every,
        separator=data.separator,
    )
    return Run(cfg, overrides, folder, resumed, data, task, trainer, throughput, stop, console)


def _choose_folder(wanted: Path, resumed: Checkpoint | None, job: int | None) -> Path:
    """Return the folder to resume in, or a new one: a sweep's jobs are numbered, a name in use gets a suffix."""
    if resumed:
        holder = resumed.path.resolve().parent
        return holder.parent if holder.name == "checkpoints" else holder
    folder = wanted if job is None else wanted / str(job)
    names = chain([folder.name], (f"{folder.name}-{number}" for number in count(2)))
    return next(free for free in map(folder.with_name, names) if not free.exists())


def _sketch_model(section: dict[str, Any], *, context: int) -> LanguageModel:
    """Build the model without values, so that sizes that do not fit are found before any data is read."""
    with torch.device("meta"):
        model: LanguageModel = checkpoint.build({**section, "vocab_size": 256})
    for module in model.modules():
        if isinstance(module, LocalAttention) and module.window > context:
            raise ValueError(f"window ({module.window}) must be at most the context (data.context={context})")
    return model
