"""The errors of random features against softmax, while a run learns."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from performer_lm.ranges import Count, ranged
from performer_lm.training.callbacks.base import RunCallback, TrainingTask

log = logging.getLogger("performer_lm")

Findings = Mapping[str, Any]  # by layer, a NamedTuple of tensors `(h,)`


@ranged
class ApproximationDiagnostics(RunCallback):
    """Log every so many steps the errors of random features on held-out text, as `favor/<name>/<layer>`.

    Each number is the mean over a layer's heads. The batch is the first of validation, so that numbers compare over
    steps and runs. Nothing of the run changes: dropout is off and no random number is drawn.

    Args:
        every: steps between diagnoses.
        diagnose: takes a model and its input, returns findings by layer.
        sequences: of the validation's first batch that are diagnosed.
    """

    def __init__(self, *, every: Count, diagnose: Callable[[nn.Module, Tensor], Findings], sequences: Count) -> None:
        self.every = every
        self.diagnose = diagnose
        self.sequences = sequences
        self._batch: Tensor | None = None

    def on_step_end(self, trainer: Trainer, task: TrainingTask, step: int) -> None:
        """Diagnose the weights as they are now; on the first rank only."""
        if step % self.every or not trainer.is_global_zero:
            return
        if self._batch is None:
            batches = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
            self._batch = next(iter(batches))[: self.sequences].to(task.device)
        findings = self.diagnose(_Losses(task), self._batch)
        if not findings and step == self.every:
            log.info("callbacks.diagnostics finds no layer that runs random features")
        metrics = {
            f"favor/{name}/{layer}": float(value.mean())
            for layer, found in findings.items()
            for name, value in found._asdict().items()
        }
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=step)


class _Losses(nn.Module):
    """A model as its objective calls it, whatever it takes: windows to losses."""

    def __init__(self, task: TrainingTask) -> None:
        super().__init__()
        self.model = task.model
        self.run = lambda windows: task.objective(task.model, windows, step=None, separator=task.separator)

    def forward(self, windows: Tensor) -> Tensor:
        """Return the losses `(b, n)` of windows `(b, n + 1)`."""
        losses: Tensor = self.run(windows).nats
        return losses


def diagnostics(
    *, every: Count | None, diagnose: Callable[[nn.Module, Tensor], Findings], sequences: Count
) -> ApproximationDiagnostics | None:
    """Build an `ApproximationDiagnostics`, unless `every` is None."""
    return None if every is None else ApproximationDiagnostics(every=every, diagnose=diagnose, sequences=sequences)
