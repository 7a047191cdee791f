"""Lightning's Trainer, set up for runs that are counted in optimizer steps."""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from performer_lm import checkpoint
from performer_lm.checkpoint import Checkpoint
from performer_lm.ops.precision import multiplies_bfloat16
from performer_lm.ranges import Count, NotNegative, Positive, ranged
from performer_lm.training.processes import make_strategy

MOST_PROCESSES = 1024  # of a machine, and machines: more would be started one by one before anything failed


class AtomicCheckpointIO(CheckpointIO):
    """Write checkpoints atomically and open them as plain data (`performer_lm.checkpoint`)."""

    resumed: Checkpoint | None = None  # read and checked already

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one file; whenever this is killed, the one before it still stands."""
        checkpoint.save(checkpoint_, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file, executing nothing from it."""
        if self.resumed and self.resumed.path == Path(path):
            return self.resumed.content
        return checkpoint.read(Path(path)).content

    def remove_checkpoint(self, path: Any) -> None:
        checkpoint.remove(Path(path))


@ranged
def make_trainer(
    *,
    max_steps: Count,
    val_every: Count,
    log_every: Count,
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"],
    devices: Annotated[int, Ge(-1), Le(MOST_PROCESSES)] | str,
    num_nodes: Annotated[int, Ge(1), Le(MOST_PROCESSES)],
    strategy: Literal["auto", "ddp", "fsdp"],
    timeout: Annotated[float, Gt(0), Le(10**6)],
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"],
    accumulate_grad_batches: Count,
    gradient_clip_val: NotNegative | None,
    deterministic: bool,
    matmul_precision: Literal["highest", "high", "medium"],
    save_every: Count | None,
    save_minutes: Positive | None,
    keep_checkpoints: Annotated[int, Ge(2)],
) -> Trainer:
    """Build a Trainer for one run of `max_steps` optimizer steps, without epochs.

    Args:
        max_steps: optimizer steps of the run.
        val_every: optimizer steps between validations.
        log_every: optimizer steps between logged metrics.
        accelerator, devices, num_nodes: of Lightning; `auto` takes what there is.
        strategy, timeout: of `make_strategy`.
        precision: of `choose_precision`.
        accumulate_grad_batches: micro-batches per optimizer step.
        gradient_clip_val: largest global gradient norm; None or 0 for no clipping.
        deterministic: whether to use only operations that come out alike every time (`use_deterministic_algorithms`).
        matmul_precision: of products of float32 (`set_float32_matmul_precision`); FAVOR's are always in full.
        save_every, save_minutes, keep_checkpoints: of `callbacks.saving.Checkpoints`, which the trainer is given later.
    """
    _quiet()
    chosen: Any = choose_precision(precision, accelerator=accelerator)
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        return Trainer(
            max_steps=max_steps,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            val_check_interval=val_every * accumulate_grad_batches,
            num_sanity_val_steps=0,
            log_every_n_steps=log_every,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=make_strategy(strategy, timeout=timeout),
            precision=chosen,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=gradient_clip_val or None,
            deterministic=deterministic,
            logger=[],
            plugins=[AtomicCheckpointIO(), *_under_slurm()],
            enable_checkpointing=False,  # callbacks.saving saves
            enable_model_summary=False,
            enable_progress_bar=False,  # callbacks.Progress shows one, on terminals
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:  # what this machine has not, or devices that cannot be
        raise ValueError(f"trainer: {error}") from error
    except (TypeError, OverflowError) as error:  # of Lightning, for devices on a machine or accelerator without GPUs
        raise ValueError(f"trainer.devices must be auto or at least 1 (-1 is for GPUs), got {devices}") from error


def _under_slurm() -> list[Any]:
    """Return SLURM as Lightning sees it, but without its requeueing: `stopping.py` does that, saved and whole."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def attach(
    trainer: Trainer, *, callbacks: Iterable[Callback], loggers: Iterable[Logger], resumed: Checkpoint | None
) -> None:
    """Give a trainer callbacks, in the order they run, loggers, and a checkpoint that need not be read again."""
    cast(Any, trainer).callbacks.extend(callbacks)
    trainer.loggers = list(loggers)
    cast(AtomicCheckpointIO, trainer.strategy.checkpoint_io).resumed = resumed


def choose_precision(precision: str, *, accelerator: str) -> str:
    """Return a precision of Lightning: `auto` is bf16-mixed where the device multiplies bfloat16, else 32-true.

    Weights, optimizer, statistics and the sums of linear attention stay in float32 either way.
    """
    if precision != "auto":
        return precision
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = "cpu" if accelerator == "cpu" or (accelerator == "auto" and found is None) else "accelerator"
    return "bf16-mixed" if multiplies_bfloat16(kind) else "32-true"


def _quiet() -> None:
    """Keep Lightning's advice out of a run's output; its warnings of real trouble stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*The number of training batches.*is smaller than the logging interval.*",  # short runs are no mistake
        ".*callbacks used to create the checkpoint.*",
        ".*broadcast_buffers. is deprecated.*",  # its successor is missing in older torch
        ".*sync_dist=True.*",  # what is logged has been added up over the ranks already
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", advice)
