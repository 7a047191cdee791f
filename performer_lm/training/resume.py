"""Which checkpoint a run goes on from, when it may, and the command that makes it."""

import math
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from performer_lm import checkpoint
from performer_lm.checkpoint import Checkpoint

AUTO = "auto"

CHUNK_SIZES = frozenset({"chunk_size", "query_chunk_size", "key_chunk_size"})
"""How much is worked on at once: it moves results by rounding only, so it makes no other run."""


def open_named(name: str) -> Checkpoint:
    """Return the checkpoint that `ckpt=name` means.

    Raises:
        ValueError: where there is none, or it is damaged: then it names the one before it.
    """
    path = checkpoint.find(name, prefer=("last", "best"))
    try:
        return checkpoint.read(path)
    except ValueError as error:
        others = [
            other for other in checkpoint.candidates(checkpoint.holder(path)) if other.resolve() != path.resolve()
        ]
        whole = next((other for other in others if _is_whole(other)), None)
        hint = f"; to go on from the one before it: ckpt={whole}" if whole else ""
        raise ValueError(f"{error}{hint}") from error


def open_newest(
    section: Mapping[str, Any], *, run_dir: Path | None, runs: Path = Path("runs")
) -> tuple[Checkpoint | None, list[str]]:
    """Return what `ckpt=auto` goes on from, and what there is to say about it.

    Of a run it is the last checkpoint, or, where that is damaged, the newest that is whole.

    Args:
        section: what the run would save.
        run_dir: the folder that the user has named; then only what lies there counts. None for the newest run below
            `runs` with this very section.
        runs: where runs lie.

    Returns:
        The checkpoint, None to start from the beginning; and lines for the log.

    Raises:
        ValueError: where all checkpoints of `run_dir` are damaged.
    """
    for run in checkpoint.newest_runs(runs) if run_dir is None else [run_dir]:
        problems: list[str] = []
        for path in checkpoint.candidates(run):
            try:
                differing = _differing(checkpoint.peek(path).section, section) if run_dir is None else []
                if not all(_keeps_results(key) for key, *_ in differing):
                    break
                found = checkpoint.read(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            return found, [f"warning: {problem}; going on from {path} instead" for problem in problems]
        if run_dir is not None and problems:
            raise ValueError(f"no checkpoint of {run} is whole: {'; '.join(problems)}")
    return None, []


def check_resumed(
    resumed: Checkpoint, section: Mapping[str, Any], *, max_steps: int, allow: Collection[str] = ()
) -> list[str]:
    """Refuse to go on with another model, tokenizer, data or way of training than the checkpoint's.

    Args:
        resumed: what the run goes on from.
        section: what it would save.
        max_steps: its length, which may grow.
        allow: names of what may change: `fingerprint.corpus`, `optimizer.lr`, or a whole section, `model`.

    Returns:
        A line for each change that was allowed, or that moves results by rounding only.

    Raises:
        ValueError: with the old and the new value of everything else that changed.
    """
    changes = _differing(resumed.section, section)
    refused = [
        f"{key} was {old!r}, is {new!r}"
        for key, old, new in changes
        if not (_keeps_results(key) or _is_allowed(key, allow))
    ]
    if refused:
        raise ValueError(
            f"{resumed.path} belongs to another run: {'; '.join(refused)} (resume.allow=[...] names what may change)"
        )
    step = resumed.content["global_step"]
    if max_steps < step:
        raise ValueError(f"trainer.max_steps ({max_steps}) must be at least the step of {resumed.path} ({step})")
    return [f"changed since the checkpoint: {key} was {old!r}, is {new!r}" for key, old, new in changes]


def share_out_anew(content: dict[str, Any], *, accumulation: int) -> None:
    """Count the micro-batches of a checkpoint as if each of its steps had had `accumulation` of them."""
    steps = content["global_step"]
    loops = content["loops"]["fit_loop"]
    for counts in (loops["epoch_loop.batch_progress"][name] for name in ("total", "current")):
        counts.update(dict.fromkeys(counts, steps * accumulation))
    for loader in loops["state_dict"].get("combined_loader", []):
        loader.update(done=steps * accumulation, accumulation=accumulation)


def _differing(saved: Mapping[str, Any], section: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return keys, old and new values of what makes two runs different ones."""
    pairs = [(name, saved.get(name), section[name]) for name in ("model", "fingerprint", "seed")]
    known = saved.get("training", {})
    pairs += [(name, known[name], new) for name, new in section.get("training", {}).items() if name in known]
    return [found for pair in pairs for found in _differences(*pair)]


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            if name in old or new[name]:  # an option that a file does not know was off
                yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, old, new


def _keeps_results(key: str) -> bool:
    """Tell whether an option trades speed and memory alone."""
    return key.rpartition(".")[-1] in CHUNK_SIZES


def _is_allowed(key: str, allow: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allow)


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.read(path)
    except ValueError:
        return False
    return True


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
