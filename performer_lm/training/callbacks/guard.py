"""The end of a run whose numbers are not finite: a loss or gradient before it reaches the weights, weights before they
are saved, a validation before it counts.

Loss and gradients are summed over ranks, so that all ranks stop at the same step. On a CPU they are checked before each
update. Checking an accelerator's numbers means waiting for it, so there they are copied aside, and checked when the
next step's gradients are there, or before anything is validated or saved: one update more is lost, and no file holds
it. Weights are checked once a save, for an update of finite numbers may still overflow.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from performer_lm.training.callbacks.agreement import send_to_host
from performer_lm.training.callbacks.base import RunCallback, TrainingTask
from performer_lm.training.callbacks.learning_rates import learning_rates

log = logging.getLogger("performer_lm")


class _Noted(NamedTuple):
    """Loss and gradient norm of a step, which may still be on their way from the device."""

    step: int
    values: Tensor  # (2,) on the host: loss, gradient norm
    arrived: torch.Event | None
    batches: list[Tensor]
    rates: dict[str, float]


class NonFiniteGuard(RunCallback):
    """Stop with `FloatingPointError` (exit code 3) at a loss, gradient, weight or validation that is not finite.

    A loss or gradient leaves a report in `nonfinite/` of the run folder: a json file, and a file per rank with the
    step's batch and the norms of all weights and, where they are still there, gradients. Under
    `trainer.precision=16-mixed` only the loss counts: gradients overflow now and then, and their scaler skips the step.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._noted: _Noted | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches = []
        self._batches.append(batch)

    def on_gradients(self, trainer: Trainer, task: TrainingTask, *, loss: Tensor, norm: Tensor) -> None:
        """Check the numbers of the last step, if they had not arrived, and take those of this step."""
        self._look(trainer)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        values = torch.stack((loss, torch.zeros_like(loss) if scaled else norm.to(loss.dtype))).detach()
        host, arrived = send_to_host(values)
        self._noted = _Noted(task.step, host, arrived, self._batches, learning_rates(trainer))
        if arrived is None:
            self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the last step and the weights before anything is saved."""
        self._look(trainer)
        if name := _find_spoilt(pl_module):
            raise FloatingPointError(
                f"the weights are not finite after step {trainer.global_step} ({name}): they are not saved; "
                f"{_told(learning_rates(trainer))}; a lower optimizer.lr may help"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the measures, before any other callback takes them for a score."""
        loss, score = (float(trainer.callback_metrics[f"val/{name}"]) for name in ("loss", "bpb"))
        if not (math.isfinite(loss) and math.isfinite(score)):
            raise FloatingPointError(
                f"validation at step {trainer.global_step} is not finite (val/loss {loss:.4g}, val/bpb {score:.4g}): "
                f"nothing is saved of it; {_told(learning_rates(trainer))}; a lower optimizer.lr or a wider "
                f"trainer.precision may help"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        noted, self._noted = self._noted, None
        if noted is None:
            return
        if noted.arrived is not None:
            noted.arrived.synchronize()
        loss, norm = noted.values.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        folder = self.run.folder / "nonfinite"
        self._save(folder, noted, trainer.lightning_module, rank=trainer.global_rank, gradients=noted.arrived is None)
        found = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        raise FloatingPointError(
            f"the {found} at step {noted.step} (loss {loss:.4g}, gradient norm {norm:.4g}, {_told(noted.rates)}); its "
            f"batch and norms lie in {folder}; a lower optimizer.lr may help"
        )

    @torch.no_grad()
    def _save(self, folder: Path, noted: _Noted, task: LightningModule, *, rank: int, gradients: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step={noted.step:06d}"
        loss, norm = noted.values.tolist()
        weights = {key: float(value.norm()) for key, value in task.named_parameters()}
        slopes = {key: value.grad for key, value in task.named_parameters() if gradients and value.grad is not None}
        norms = {key: float(value.norm()) for key, value in slopes.items()}
        told = {"step": noted.step, "loss": loss, "grad_norm": norm, **noted.rates}
        torch.save(
            {**told, "batch": [x.cpu() for x in noted.batches], "weight_norms": weights, "gradient_norms": norms},
            folder / f"{name}-rank{rank}.pt",
        )
        if rank == 0:
            spoilt = {
                f"not_finite_{kind}": [key for key, value in found.items() if not math.isfinite(value)]
                for kind, found in (("weights", weights), ("gradients", norms))
            }
            (folder / f"{name}.json").write_text(json.dumps({**told, **spoilt}, indent=2) + "\n")


def _told(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())


@torch.no_grad()
def _find_spoilt(task: LightningModule) -> str | None:
    """Return the name of a weight or statistic that is not finite; all ranks find the same one."""
    for named in (dict(task.named_parameters()), dict(task.named_buffers())):  # shares of FSDP, and whole tensors
        found = {name: value for name, value in named.items() if value.is_floating_point() and value.numel()}
        if found and not math.isfinite(_largest(list(found.values()))):
            return next(name for name, value in found.items() if not math.isfinite(_largest([value])))
    return None


def _largest(values: list[Tensor]) -> float:
    """Return the largest magnitude; nan where there is one."""
    norm = get_total_norm(values, norm_type=math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
