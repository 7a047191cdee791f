"""Hyperparameters that a resumed run was allowed to change."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from performer_lm.training.callbacks.base import TrainingTask


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
