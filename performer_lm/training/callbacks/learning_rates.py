"""The learning rates that updates are made with."""

from lightning.pytorch import Trainer
from torch import Tensor

from performer_lm.training.callbacks.base import RunCallback, TrainingTask
from performer_lm.training.optim import MATRICES


class LearningRates(RunCallback):
    """Log `train/lr`, and `train/lr_matrices` where the hidden layers' matrices have a rate of their own (Muon)."""

    def on_gradients(self, trainer: Trainer, task: TrainingTask, *, loss: Tensor, norm: Tensor) -> None:
        if task.logs_now:
            for name, rate in learning_rates(trainer).items():
                task.log(f"train/{name}", rate)


def learning_rates(trainer: Trainer) -> dict[str, float]:
    """Return the rate `lr`, and that of the matrices, `lr_matrices`, where it differs."""
    groups = trainer.optimizers[0].param_groups
    of_kind = {bool(group.get(MATRICES)): float(group["lr"]) for group in groups}
    rate = of_kind.get(False, of_kind.get(True, 0.0))
    return {"lr": rate, **({"lr_matrices": of_kind[True]} if of_kind.get(True, rate) != rate else {})}
