"""Resuming: the checkpoints that a run may go on from, the changes allowed, and the command for it."""

import json
import math
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from performer_lm.building import TARGET
from performer_lm.checkpoint import AVERAGES, Checkpoint
from performer_lm.checkpoint.backend import FAVOR, set_path
from performer_lm.data.windows import FiniteWindows

EMA = "callbacks.ema.decay"

FORMER_DEFAULTS: dict[str, list[Any]] = {"heads": [8], "local_heads": [0], "num_features": [64, 128]}
"""Options of a model, and their defaults in earlier versions, by which a run that began with them goes on."""

FORMER_ATTN: dict[str, Any] = {
    TARGET: FAVOR,
    "num_features": 128,
    "chunk_size": None,
    "kernel": "auto",
    "features": {
        TARGET: "performer_lm.attention.feature_maps.SoftmaxFeatures",
        **{"_partial_": True, "coupling": "orthogonal", "momentum": None},
        **dict.fromkeys(("regularized", "antithetic", "learned", "centred"), False),
    },
    **{"_partial_": True, "redraw_interval": None, "redraw_until": None},
}
"""The attention of earlier versions where none was typed."""

ROUNDING = frozenset({"chunk_size", "query_chunk_size", "key_chunk_size", "kernel"})
"""Options that move results by rounding only, so that a run with another one is the same run."""


def check_resumed(
    resumed: Checkpoint, section: Mapping[str, Any], *, max_steps: int, allow: Collection[str] = ()
) -> list[str]:
    """Refuse to go on with another model, tokenizer, data or way of training than the checkpoint's.

    Args:
        resumed: the checkpoint.
        section: of the checkpoints of the run.
        max_steps: length of the run, which may grow.
        allow: names of options that may change: `fingerprint.corpus`, `optimizer.lr`, or a whole section, `model`.

    Returns:
        A line for each change that was allowed, or that moves results by rounding only.

    Raises:
        ValueError: with the old and the new value of everything else that changed.
    """
    # to begin to average needs no leave: the run's callback tells of it
    changes = [change for change in _differing(resumed.section, section) if change[:2] != (EMA, None)]
    if AVERAGES in resumed.content and "callbacks" not in _training(resumed.section):  # by an earlier version
        decay = _training(section).get("callbacks", {}).get("ema", {}).get("decay")
        changes += _differences(EMA, "set", "set" if decay else None)
    allowed = tuple(f"{name}." for name in allow)
    refused = [
        f"{key} was {old!r}, is {new!r}"
        for key, old, new in changes
        if not (_keeps_results(key) or f"{key}.".startswith(allowed))
    ]
    if refused:
        raise ValueError(
            f"{resumed.path} belongs to another run: {'; '.join(refused)} (resume.allow=[...] names what may change)"
        )
    step = resumed.content.get("global_step", 0)
    if max_steps < step:
        raise ValueError(f"trainer.max_steps ({max_steps}) must be at least the step of {resumed.path} ({step})")
    return [f"changed since the checkpoint: {key} was {old!r}, is {new!r}" for key, old, new in changes]


def keep_former_defaults(section: dict[str, Any], saved: Mapping[str, Any], *, typed: Collection[str]) -> None:
    """Give a model's options the defaults of the version that its run began with, but for those that were typed.

    Args:
        section: of the model; changed.
        saved: the same section of the checkpoint.
        typed: paths of the options that were typed.
    """
    former = former_defaults(typed)
    for name, value in section.items():
        old = saved.get(name)
        if isinstance(value, dict) and isinstance(old, Mapping):
            if name == "attn" and "attn" not in typed and old.get(TARGET) == FAVOR != value.get(TARGET):
                value = section[name] = _former_attn(value, typed)
            keep_former_defaults(value, old, typed=typed)
        elif name in former and old in former[name]:
            section[name] = old


def _former_attn(wanted: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """Return the former default attention, with the seed of the wanted one and those of its options that were typed."""
    section = deepcopy(FORMER_ATTN)
    for path in ("attn.seed", *typed):
        before, _, option = path.rpartition("attn.")
        if option and before in ("", "model."):
            set_path(option.split("."), wanted, section)
    return section


def former_defaults(typed: Collection[str]) -> dict[str, list[Any]]:
    """Return the former defaults of the options that were not typed."""
    names = {path.rpartition(".")[-1] for path in typed}
    return {name: value for name, value in FORMER_DEFAULTS.items() if name not in names}


def is_like(saved: Mapping[str, Any], section: Mapping[str, Any]) -> bool:
    """Return True where a checkpoint is of a run that was started as the one at hand."""
    same_start = saved.get("init") == section.get("init")
    return same_start and all(_keeps_results(key) for key, *_ in _differing(saved, section))


def validation_digest(windows: FiniteWindows, objective: Mapping[str, Any]) -> str:
    """Return a digest of validation data and objective: scores of two runs compare where it is the same."""
    kept = {name: value for name, value in objective.items() if name not in ROUNDING}
    digest = sha256(json.dumps(kept, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(windows.byte_lengths).tobytes())
    for first in range(0, len(windows), 256):
        places = np.arange(first, min(first + 256, len(windows)))
        digest.update(windows.rows(places).numpy().tobytes())
    return digest.hexdigest()


def forget_best(resumed: Checkpoint, section: Mapping[str, Any]) -> list[str]:
    """Forget the best score where the run validates on something else from now on, and return a line that says so."""
    if resumed.section.get("validation") in (None, section["validation"]):  # None: of an earlier version
        return []
    callbacks = resumed.content["callbacks"]
    scores = {"best_model_score", "best_score"}
    for name in [name for name, state in callbacks.items() if isinstance(state, dict) and scores & state.keys()]:
        del callbacks[name]
    return ["the best score starts anew: what the run validates on is not what the checkpoint was measured on"]


def share_out_anew(content: dict[str, Any], *, accumulation: int) -> None:
    """Count the micro-batches of a checkpoint as if each of its steps had had `accumulation` of them."""
    done = content["global_step"] * accumulation
    loops = content["loops"]["fit_loop"]
    for counts in (loops["epoch_loop.batch_progress"][name] for name in ("total", "current")):
        counts.update(dict.fromkeys(counts, done))
    for loader in loops["state_dict"].get("combined_loader", []):
        loader.update(done=done, accumulation=accumulation)


def _differing(saved: Mapping[str, Any], section: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return keys, old and new values of sections that make two runs different ones."""
    pairs = [(name, saved.get(name), section[name]) for name in ("model", "fingerprint", "seed")]
    known = _training(saved)
    pairs += [(name, known[name], new) for name, new in section.get("training", {}).items() if name in known]
    return [found for pair in pairs for found in _differences(*pair)]


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    old, new = _in_use(old), _in_use(new)
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            if (name in old and name in new) or old.get(name) or new.get(name):  # an option that one lacks is off there
                yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, old, new


def _in_use(value: Any) -> Any:
    """Return a section, and of a pattern's backends those that it names: any version offers others besides."""
    if not (isinstance(value, dict) and isinstance(value.get("backends"), dict) and "pattern" in value):
        return value
    return {**value, "backends": {name: x for name, x in value["backends"].items() if name in value["pattern"]}}


def _training(section: Mapping[str, Any]) -> Mapping[str, Any]:
    found = section.get("training")
    return found if isinstance(found, Mapping) else {}


def _keeps_results(key: str) -> bool:
    """Return True for an option that trades speed and memory alone."""
    return key.rpartition(".")[-1] in ROUNDING


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
