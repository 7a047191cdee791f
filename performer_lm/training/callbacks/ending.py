"""The last step of a run."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FinalValidation(Callback):
    """Validate after the last step, whatever the interval between validations."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the trainer to stop once it has taken its last step: stopping, it validates."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True
