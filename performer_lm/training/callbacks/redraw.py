"""Random projections, set between optimizer steps."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm.model import PerformerLM


class Redraw(Callback):
    """Set random projections before each optimizer step, as a function of the step alone; never inside one."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Redraw where an accumulation window begins."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            cast(PerformerLM, pl_module.model).redraw(trainer.global_step)
