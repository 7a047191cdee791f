"""Random projections, set between optimizer steps."""

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from performer_lm.training.callbacks.base import RunCallback

if TYPE_CHECKING:
    from performer_lm.training.task import LanguageModelTask


class Redraw(RunCallback):
    """Set random projections before each optimizer step, as a function of the step alone; never inside one."""

    def on_step_start(self, trainer: Trainer, task: "LanguageModelTask", step: int) -> None:
        """Redraw where a step begins."""
        task.model.redraw(step - 1)
