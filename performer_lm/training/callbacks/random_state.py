"""The random number generators of a run: seeded per rank, saved, and restored where a resumed run goes on.

Only `nn.Dropout` draws from them; data, projections and samples have generators of their own.
"""

import random
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm.ops.hashing import mix_seed

State = dict[str, Any]


class RandomState(Callback):
    """Give each rank a stream of random numbers, keep it through resuming, and keep validation out of it."""

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self._restored: State | None = None
        self._before_validation: State | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed this rank, whatever was drawn before."""
        lightning.seed_everything(mix_seed(self.seed, trainer.global_rank) % 2**32, workers=True, verbose=False)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take this rank's state; a rank that the saved run did not have keeps its seed."""
        states = checkpoint.get("random", [])
        self._restored = states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the loaded state before the first step: setting up loops and loaders draws too."""
        if self._restored is not None:
            restore(self._restored, pl_module.device)
            self._restored = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = capture(pl_module.device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_validation is not None:
            restore(self._before_validation, pl_module.device)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the states of all ranks as plain data and tensors."""
        own = capture(pl_module.device) if self._restored is None else self._restored
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint["random"] = states


def capture(device: torch.device) -> State:
    """Return the state of Python's, NumPy's and torch's generators, and of the device's own."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: State = {
        "python": [version, list(numbers), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore(state: State, device: torch.device) -> None:
    """Set all generators to a state of `capture`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
