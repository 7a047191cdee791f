"""When a run may go on from a checkpoint, and the command that makes it."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from performer_lm.checkpoint import Checkpoint


def check_resumed(resumed: Checkpoint, section: Mapping[str, Any], *, max_steps: int) -> None:
    """Refuse to go on with another model, tokenizer or data than the checkpoint's."""
    saved = resumed.section
    differences = [
        f"{key} was {old!r}, is {new!r}"
        for name in ("model", "fingerprint", "seed")
        for key, old, new in _differences(name, saved.get(name), section[name])
    ]
    if differences:
        raise ValueError(f"{resumed.path} belongs to another run: {'; '.join(differences)}")
    step = resumed.content["global_step"]
    if max_steps < step:
        raise ValueError(f"trainer.max_steps ({max_steps}) must be at least the step of {resumed.path} ({step})")


def _differences(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        return [found for name in names for found in _differences(f"{key}.{name}", old.get(name), new.get(name))]
    return [] if old == new else [(key, old, new)]


def best_score(resumed: Checkpoint) -> float:
    """Return the best validation bits per byte of the run so far; nan where it has not validated yet."""
    states = [state for state in resumed.content["callbacks"].values() if isinstance(state, dict)]
    scores = [state["best_model_score"] for state in states if state.get("best_model_score") is not None]
    return min(map(float, scores), default=math.nan)


def resume_command(overrides: Sequence[str], *, folder: Path, step: int, max_steps: int) -> str:
    """Return the command that goes on at `step`; a finished run is given as many steps again."""
    longer = [f"trainer.max_steps={2 * max_steps}"] if step >= max_steps else []
    replaced = ("ckpt=", "run_dir=", *(["trainer.max_steps="] if longer else []))
    kept = [override for override in overrides if not override.startswith(replaced)]
    return shlex.join(["python", "train.py", *kept, f"ckpt={folder}", *longer])
