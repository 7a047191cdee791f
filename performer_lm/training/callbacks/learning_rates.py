"""The settings that updates are made with: learning rates, and what a resumed run was allowed to change."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

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


class NewSettings(Callback):
    """Put the optimizer's and the schedule's settings of this command line in the place of the checkpoint's."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over everything but the state: averages, momenta and the step stay."""
        fresh = cast(TrainingTask, pl_module).configure_optimizers()["optimizer"].param_groups
        groups = trainer.optimizers[0].param_groups
        for group, new in zip(groups, fresh, strict=True):
            group.update({name: value for name, value in new.items() if name != "params"})
        for config in trainer.lr_scheduler_configs:
            scheduler = cast(LambdaLR, config.scheduler)
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, share in zip(groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * share(scheduler.last_epoch)
