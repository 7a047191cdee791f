"""When a run is saved."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint


def checkpoints(folder: Path) -> list[Callback]:
    """Save, at every validation, `best.ckpt` where `val/bpb` has fallen and `last.ckpt` anyway."""
    common: dict[str, Any] = {
        "dirpath": folder,
        "save_on_train_epoch_end": False,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    return [
        ModelCheckpoint(filename="best", monitor="val/bpb", mode="min", **common),
        ModelCheckpoint(filename="last", **common),
    ]
