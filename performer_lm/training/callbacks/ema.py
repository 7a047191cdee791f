"""An exponential moving average of the weights, which validates, samples and generates in their place.

The average is a model of its own: no weights are ever swapped, whatever happens during a validation. The two models
share their buffers, so that random projections are the current ones; an average of redraws would be no projection.

Averages are float32 at least: in bfloat16 a step of 1 - decay = 0.002 would round away. A model of less precision gets
them rounded before it validates.
"""

import copy
import logging
from typing import Annotated, Any, cast

from annotated_types import Gt, Lt
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from performer_lm.checkpoint import AVERAGES
from performer_lm.language_model import LanguageModel
from performer_lm.ops.precision import widen
from performer_lm.ranges import ranged
from performer_lm.training.callbacks.base import RunCallback, TrainingTask

log = logging.getLogger("performer_lm")
Decay = Annotated[float, Gt(0), Lt(1)]


@ranged
class WeightAverage(RunCallback):
    """Move an average of all parameters towards them after every step.

    Args:
        decay: share of the average that a step keeps, once there were many: step s keeps at most (1 + s) / (10 + s),
            so that the average forgets the initial weights however short a run is.
    """

    model: LanguageModel
    averages: dict[str, Tensor]  # by the names of the model's parameters; these themselves where they are wide enough

    def __init__(self, *, decay: Decay) -> None:
        self.decay = decay
        self._saved: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the model, on its device, or its saved average; from now on the task measures the average."""
        task = cast(TrainingTask, pl_module)
        self.model = copy.deepcopy(task.model, {id(buffer): buffer for buffer in task.model.buffers()})
        self.model.eval().requires_grad_(False)
        self.averages = {name: widen(value.data) for name, value in self.model.named_parameters()}
        if self._saved is not None:
            for name in self.averages.keys() & self._saved.keys():  # another backend may own others
                self.averages[name].copy_(self._saved[name])
            self._saved = None
        elif trainer.ckpt_path:
            log.info("%s holds no average of weights: it starts from the weights themselves", trainer.ckpt_path)
        task.measure(self.model)

    def on_step_end(self, trainer: Trainer, task: TrainingTask, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = list(self.averages.values())
        weights = [
            value.data.to(average.dtype) for value, average in zip(task.model.parameters(), averages, strict=True)
        ]
        get_ema_multi_avg_fn(decay)(averages, weights, step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in self.model.named_parameters():
            value.data.copy_(self.averages[name])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the averages beside the weights, each under all names that it has."""
        found = {id(value): self.averages[name] for name, value in self.model.named_parameters()}
        named = self.model.named_parameters(remove_duplicate=False)
        checkpoint[AVERAGES] = {name: found[id(value)] for name, value in named}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the saved averages until there is a model for them."""
        self._saved = checkpoint.get(AVERAGES)


def average_weights(*, decay: Decay | None) -> WeightAverage | None:
    """Build a `WeightAverage`, unless `decay` is None."""
    return None if decay is None else WeightAverage(decay=decay)
