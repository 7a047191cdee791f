"""Random features, changed between optimizer steps."""

from lightning.pytorch import Trainer

from performer_lm.training.callbacks.base import RunCallback, TrainingTask


class Redraw(RunCallback):
    """Set random projections before each optimizer step, as a function of the step alone, and settle averages."""

    def on_step_start(self, trainer: Trainer, task: TrainingTask, step: int) -> None:
        """Settle and redraw where a step begins, never inside one."""
        task.model.settle()
        task.model.redraw(step - 1)
