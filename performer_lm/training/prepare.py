"""From a training config to a run that is ready: all that a user can get wrong, cheapest first.

Nothing is written before everything has succeeded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from performer_lm import checkpoint
from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.local import LocalAttention
from performer_lm.attention.split import SplitAttention
from performer_lm.building import build, build_model, escape
from performer_lm.checkpoint import Checkpoint
from performer_lm.checkpoint.backend import typed_paths
from performer_lm.data.module import WindowData
from performer_lm.data.tokenizer.recipes import Restored
from performer_lm.encoder_decoder import PerformerEncoderDecoder
from performer_lm.language_model import LanguageModel
from performer_lm.nn.attention import MultiHeadAttention
from performer_lm.performer import Performer
from performer_lm.training.callbacks.base import RunCallback, RunDetails
from performer_lm.training.callbacks.guard import NonFiniteGuard
from performer_lm.training.callbacks.learning_rates import LearningRates, NewSettings
from performer_lm.training.callbacks.limits import FinalValidation
from performer_lm.training.callbacks.progress import ProgressReport
from performer_lm.training.callbacks.random_state import RandomState
from performer_lm.training.callbacks.redraw import Redraw
from performer_lm.training.callbacks.saving import Checkpoints, StepBoundary
from performer_lm.training.callbacks.stopping import StopOnSignal
from performer_lm.training.callbacks.summary import ModelSummary
from performer_lm.training.callbacks.throughput import Throughput
from performer_lm.training.compile import compile_stacks
from performer_lm.training.folder import RunFolder
from performer_lm.training.given import check_tokenizer, describe_given, take_tokenizer
from performer_lm.training.loggers.record import MetricsLogger
from performer_lm.training.optim import check_scaling, parameter_groups
from performer_lm.training.origin import Origin
from performer_lm.training.processes import OneRun
from performer_lm.training.restoring import check_callbacks
from performer_lm.training.resume import best_score, validation_digest
from performer_lm.training.run import Run, plain
from performer_lm.training.sharding import check_sharding, without_samples
from performer_lm.training.task import LanguageModelTask
from performer_lm.training.trainer import attach


def prepare(cfg: DictConfig, *, overrides: Sequence[str], job: int | None = None) -> Run:
    """Check and build everything that a run needs.

    Args:
        cfg: the composed training config.
        overrides: what the user typed, for the resume command.
        job: number of this job within a sweep.

    Raises:
        ValueError: for whatever the user has to put right, in one line.
    """
    trainer: Trainer = build(plain(cfg.trainer), key="trainer")
    objective, optimizer, schedule = (
        build(plain(cfg[name]), key=name) for name in ("objective", "optimizer", "schedule")
    )
    check_scaling(optimizer(parameter_groups(nn.Linear(1, 1), head=nn.Identity())), precision=str(trainer.precision))
    schedule(trainer.max_steps)
    wanted = Path(cfg.run_dir) if job is None else Path(cfg.run_dir) / str(job)
    origin = Origin(cfg, overrides=overrides, wanted=wanted)
    sketch = _sketch_model(plain(cfg.model), context=cfg.data.context, overrides=overrides)
    data = _build_data(cfg, origin.given, overrides)
    objective.check(sketch, packed=data.is_packed, answers=data.has_answers)
    _check_backends(sketch, packed=data.is_packed, device=trainer.strategy.root_device)
    data.share(trainer)

    data.prepare()
    if origin.given:
        check_tokenizer(data, origin.given)
    objective.adopt(data.tokenizer)
    section = _describe(cfg, data, trainer)
    section["training"] |= objective.sources()
    origin.settle(section, max_steps=trainer.max_steps)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    model: LanguageModel = build_model(section["model"])
    objective.join(model)
    origin.load(model, optimizer, section)
    if cfg.compile:
        compile_stacks(model, device=trainer.strategy.root_device)
    task = LanguageModelTask(
        model,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        byte_lengths=torch.from_numpy(data.validation.byte_lengths),
        section=section,
        log_every=cfg.trainer.log_every,
        separator=data.separator,
        counted=data.counted,
    )
    origin.restore(trainer, task)
    folder = origin.take_folder(writes=trainer.is_global_zero)
    try:
        return _assemble(cfg, overrides, folder, origin, data, task, trainer)
    except BaseException:
        folder.release()
        raise


def _build_data(cfg: DictConfig, given: Checkpoint | None, overrides: Sequence[str]) -> WindowData:
    """Build the data, with the tokenizer of given weights, if there are any and the data are text."""
    tokenizer = take_tokenizer(given, overrides=overrides) if given else None
    if tokenizer is None or "tokenizer" not in cfg.data:
        return build(plain(cfg.data), key="data")
    section = {name: value for name, value in plain(cfg.data).items() if name != "tokenizer"}
    return build(section, key="data", more={"tokenizer": Restored(plain=tokenizer.to_dict())})


def _describe(cfg: DictConfig, data: WindowData, trainer: Trainer) -> dict[str, Any]:
    """Return the section of the run's checkpoints, which must be alike where the run goes on."""
    section = checkpoint.describe(
        model={**plain(cfg.model), "vocab_size": data.tokenizer.vocab_size},
        tokenizer=data.tokenizer,
        fingerprint={
            **data.fingerprint(),
            "ranks": trainer.world_size,
            "accumulation": trainer.accumulate_grad_batches,
        },
        seed=cfg.seed,
        training={
            **{name: plain(cfg[name]) for name in ("objective", "optimizer", "schedule")},
            "compile": cfg.compile,
            "trainer": {"precision": trainer.precision, "gradient_clip_val": trainer.gradient_clip_val},
            "callbacks": {"ema": {"decay": OmegaConf.select(cfg, "callbacks.ema.decay")}},
        },
    )
    section["validation"] = validation_digest(data.validation, plain(cfg.objective))
    section["init"] = None if cfg.init is None else describe_given(cfg.init)
    if teacher := section["training"]["objective"].get("teacher"):
        section["training"]["objective"]["teacher"] = describe_given(teacher)
    return section


def _assemble(
    cfg: DictConfig,
    overrides: Sequence[str],
    folder: RunFolder,
    origin: Origin,
    data: WindowData,
    task: LanguageModelTask,
    trainer: Trainer,
) -> Run:
    """Build callbacks and loggers, and give them to the trainer in the order in which they run."""
    resumed = origin.resumed
    cfg.run_dir = escape(str(folder.path))
    details = RunDetails(
        folder=folder.path,
        console=Console(highlight=False, quiet=not trainer.is_global_zero),
        tokenizer=data.tokenizer,
        context=cfg.data.context,
        tokens_per_step=cfg.data.batch_size * cfg.data.context,
        log_every=cfg.trainer.log_every,
    )
    saving = Checkpoints(
        folder.checkpoints,
        every=cfg.trainer.save_every,
        minutes=cfg.trainer.save_minutes,
        keep=cfg.trainer.keep_checkpoints,
        best=best_score(resumed) if resumed else float("nan"),
        resumed=resumed.path if resumed else None,
    )
    stop = StopOnSignal(saving)
    throughput = Throughput()
    chosen = build(plain(cfg.callbacks), key="callbacks").values() if cfg.get("callbacks") else ()
    own: list[Callback] = [callback for callback in chosen if callback is not None]  # None: switched off
    check_sharding(trainer, task.model, task.optimizer(parameter_groups(task.model, head=task.model.head)), own)
    source = f"{resumed.path} at step {resumed.content['global_step']}" if resumed else ""
    callbacks: list[Callback] = [
        OneRun(folder, saving, resumed=source),
        RandomState(seed=cfg.seed),
        ModelSummary(),
        Redraw(),
        NonFiniteGuard(),
        FinalValidation(),
        throughput,
        LearningRates(),
        ProgressReport(),
        *without_samples(trainer, own),
        StepBoundary(),
        saving,
        stop,
        *([NewSettings()] if resumed and cfg.resume.allow else []),
    ]
    if resumed:
        check_callbacks(resumed, callbacks)
    for callback in callbacks:
        if isinstance(callback, RunCallback):  # a config may add Lightning's own
            callback.join(details)
    added = build(plain(cfg.logger), key="logger").values() if cfg.get("logger") else ()
    record = MetricsLogger(folder=folder.path)
    attach(trainer, callbacks=callbacks, loggers=[record, *added], resumed=resumed)
    return Run(
        cfg=cfg,
        overrides=overrides,
        run_folder=folder,
        resumed=resumed,
        data=data,
        task=task,
        trainer=trainer,
        throughput=throughput,
        saving=saving,
        stop=stop,
        record=record,
        console=details.console,
        notes=origin.notes,
    )


def _sketch_model(section: dict[str, Any], *, context: int, overrides: Sequence[str]) -> LanguageModel:
    """Build the model without values, so that sizes that do not fit are found before any data is read."""
    with torch.device("meta"):
        model: LanguageModel = build_model({**section, "vocab_size": 256})
    untyped = not typed_paths(overrides, "model.local")  # the default of local heads, which may be longer
    may_see_all = {each.nearby for each in model.modules() if isinstance(each, SplitAttention) and untyped}
    for module in model.modules():
        if isinstance(module, LocalAttention) and module.window > context and module not in may_see_all:
            raise ValueError(f"window ({module.window}) must be at most the context (data.context={context})")
        if isinstance(module, Performer) and module.max_len is not None:
            halved = isinstance(model, PerformerEncoderDecoder)  # a window is a source and its target
            longest = context if not halved else (context + 1) // 2 if module.causal else context // 2 + 1
            if module.max_len < longest:
                raise ValueError(
                    f"model.absolute has {module.max_len} places, for {longest} tokens (data.context={context})"
                )
    return model


def _check_backends(sketch: LanguageModel, *, packed: bool, device: torch.device) -> None:
    """Refuse options that a layer's attention cannot keep, before any data is read."""
    for module in sketch.modules():
        if isinstance(module, MultiHeadAttention):
            module.backend.check(causal=module.causal, packed=packed)
        if isinstance(module, FavorAttention):
            module.check_kernel(device)
