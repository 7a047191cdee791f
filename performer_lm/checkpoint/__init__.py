"""A checkpoint file: how it is written so that a kill never costs the last one, and opened without trusting it.

Beside what the trainer keeps, a file holds one plain-data key:

    performer_lm: {format: 1, model: {...}, tokenizer: {...}, fingerprint: {...}, seed: 0}

`model` is the config section the model was built from. Opening a file reads plain data and tensors only
(`weights_only=True`) and builds only model classes that this package defines.

`files.py` writes and reads; `reading.py` and `pickles.py` bound what a file may hold, `contents.py` describes its
sections and checks them. `opening.py` rebuilds the model once `sizes.py` has found its size in the file. `finding.py`
says which file a name means.
"""

from performer_lm.building import build_model as build
from performer_lm.checkpoint.contents import AVERAGES, FORMAT, describe
from performer_lm.checkpoint.files import Checkpoint, delete_stale, peek, point, read, remove, save, sidecar_of
from performer_lm.checkpoint.finding import candidates, find, holder, name_of, named_by_step, newest_runs, step_of
from performer_lm.checkpoint.opening import check_fit, load_weights, open_model, open_objective, other_attention

__all__ = [
    "AVERAGES",
    "FORMAT",
    "Checkpoint",
    "build",
    "candidates",
    "check_fit",
    "delete_stale",
    "describe",
    "find",
    "holder",
    "load_weights",
    "name_of",
    "named_by_step",
    "newest_runs",
    "open_model",
    "open_objective",
    "other_attention",
    "peek",
    "point",
    "read",
    "remove",
    "save",
    "sidecar_of",
    "step_of",
]
