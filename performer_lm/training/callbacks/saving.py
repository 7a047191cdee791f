"""When a run saves, what its files are called, and which of them are kept.

Saves happen between optimizer steps, after the metrics of the last one are written: at the end of a validation, or
before the first micro-batch of a step. There the trainer's counters, the data's position and the metrics record agree.
"""

import math
import time
from pathlib import Path
from typing import Annotated, Any, cast

from annotated_types import Ge
from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm import checkpoint
from performer_lm.language_model import LanguageModel
from performer_lm.ranges import Count, Positive, ranged
from performer_lm.training.callbacks.agreement import Agreement


@ranged
class Checkpoints(Callback):
    """Save at every validation and, where asked, between; link `best.ckpt` and `last.ckpt` to the files.

    Kept are the best, the last and the ones before it, `keep` in all; older ones are deleted.

    Args:
        folder: where the files lie.
        every: optimizer steps between saves beside validation; None for none.
        minutes: time between saves beside validation; None for none.
        keep: how many of the last saves stay, at least two: a damaged file needs another.
        best: the best score so far, of a run that goes on.
        resumed: the file that the run goes on from.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: Count | None,
        minutes: Positive | None,
        keep: Annotated[int, Ge(2)],
        best: float = math.nan,
        resumed: Path | None = None,
    ) -> None:
        self.folder = folder
        self.every = every
        self.minutes = minutes
        self.keep = keep
        self.best = best
        self.last = resumed.resolve() if resumed else None
        self._kept: list[Path] = []  # the last step last
        self._step = -1  # the last one saved
        self._mark = 0.0  # when
        self._time = Agreement()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, delete what a killed save has left, and count the checkpoints that lie there."""
        self._mark = time.monotonic()
        self._step = trainer.global_step if self.last else -1
        if trainer.is_global_zero and self.folder.is_dir():
            checkpoint.delete_stale(self.folder)
            lying = reversed(checkpoint.named_by_step(self.folder))
            self._kept = [path for path in lying if checkpoint.step_of(path) <= trainer.global_step]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save before a step, where it is time."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._is_due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was measured; a validation that something calls for inside a step is not one to go on from."""
        if is_between_steps(trainer):
            cast(LanguageModel, pl_module.model).settle()  # and projections stay those that were measured
            self._write(trainer, float(trainer.callback_metrics["val/bpb"]))

    def save(self, trainer: Trainer) -> None:
        """Save now, between two steps, unless this step is saved already."""
        if trainer.global_step != self._step:
            self._write(trainer, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, which a run that goes on has to beat."""
        return {"best_model_score": None if math.isnan(self.best) else self.best}

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every is not None and step and step % self.every == 0:
            return True
        if self.minutes is None:
            return False
        is_time = trainer.is_global_zero and time.monotonic() - self._mark >= 60 * self.minutes  # by one clock
        return self._time.reach(trainer, wanted=is_time)

    def _write(self, trainer: Trainer, score: float | None) -> None:
        """Write one file on the first rank; all ranks take part, for each holds some of it."""
        path = self.folder / checkpoint.name_of(trainer.global_step, score)
        is_best = score is not None and math.isfinite(score) and not score >= self.best
        if is_best:
            self.best = cast(float, score)
        trainer.save_checkpoint(path)
        self._time.forget()
        self._step, self._mark, self.last = trainer.global_step, time.monotonic(), path
        if trainer.is_global_zero:
            if is_best:  # before `last`: killed in between, the run goes on from the one before and comes here again
                checkpoint.point(self.folder / "best.ckpt", path)
            checkpoint.point(self.folder / "last.ckpt", path)
            self._retire(path)

    def _retire(self, path: Path) -> None:
        """Delete all but the best, the last and those before it, and what a run has gone back behind."""
        self._kept = [*(kept for kept in self._kept if kept.name != path.name), path][-self.keep :]
        names = {kept.name for kept in self._kept} | {(self.folder / "best.ckpt").resolve().name}
        for old in checkpoint.named_by_step(self.folder):
            if old.name not in names:
                checkpoint.remove(old)


class StepBoundary(Callback):
    """Refuse checkpoints inside a step, and count saved micro-batches alike wherever the trainer saves.

    Gradients are in no checkpoint: one saved between the micro-batches of a step would lose those it has.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that no step is under way, and set every counter to the micro-batches that are done."""
        if not is_between_steps(trainer):
            raise RuntimeError(
                f"a checkpoint inside step {trainer.global_step + 1} would lose the gradients of its first "
                f"micro-batches: save at the end of a validation or before a step"
            )
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(("ready", "started", "processed"), counts["completed"]))
        progress["is_last_batch"] = False  # of the next micro-batch, where that has been fetched; a run may grow, too

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count steps as the trainer's own count of updates does, for resuming leaves it one behind in some cases."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def is_between_steps(trainer: Trainer) -> bool:
    """Return True if every micro-batch that was taken has reached the weights."""
    counts = trainer.fit_loop.epoch_loop.batch_progress.current.state_dict()
    return counts["started"] == counts["completed"] and not counts["completed"] % trainer.accumulate_grad_batches
