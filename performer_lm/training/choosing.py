"""Which checkpoint a run goes on from: the one that is named, or the one that `ckpt=auto` finds.

Going back to an older checkpoint is said in a line; starting over, where there is something to go on with, is refused.
"""

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from performer_lm import checkpoint
from performer_lm.checkpoint import Checkpoint
from performer_lm.training.folder import is_config_of
from performer_lm.training.resume import former_defaults, is_like, keep_former_defaults

AUTO = "auto"


def open_named(name: str) -> Checkpoint:
    """Return the checkpoint that `ckpt=name` means.

    Raises:
        ValueError: where there is none, or it is damaged: then it names the one before it; where a run's own link
            leads to another run.
    """
    path = checkpoint.find(name, prefer=("last", "best"))
    if path.name in ("best.ckpt", "last.ckpt"):
        _check_home(path)
    try:
        return checkpoint.read(path)
    except ValueError as error:
        others = checkpoint.candidates(checkpoint.holder(path))
        whole = next((other for other in others if not _is_same_file(other, path) and _is_whole(other)), None)
        hint = f"; to go on from the one before it: ckpt={whole}" if whole else ""
        raise ValueError(f"{error}{hint}") from error


def open_last(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint that `ckpt=auto` goes on from in the folder that the user has named, and notes on it.

    It is the last checkpoint, or, where that is damaged, the newest that is whole; None where there is none yet.

    Raises:
        ValueError: where all checkpoints are damaged.
    """
    problems: list[str] = []
    for path in checkpoint.candidates(run):
        _check_home(path)
        try:
            return checkpoint.read(path), _fallen_back(problems, path)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise _none_whole(run, problems)
    is_begun = (run / "config.yaml").exists()
    return None, [f"{run} holds no checkpoint yet: it starts from the beginning"] if is_begun else []


def open_newest(
    section: Mapping[str, Any], cfg: DictConfig, *, typed: Sequence[str] = (), runs: Path = Path("runs")
) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint that `ckpt=auto` goes on from where no folder is named, and notes on it.

    It is the newest run below `runs` like this one, and of its checkpoints the one that `open_last` takes. Args: the
    section that the run would save; its config, by which a run is known whose checkpoints do not open; the options of
    the model that were typed.

    Raises:
        ValueError: where all checkpoints of that run are damaged: starting over has to be typed.
    """
    passed: list[str] = []
    for run in checkpoint.newest_runs(runs):
        problems: list[str] = []
        was_like = False
        for path in checkpoint.candidates(run):
            try:
                saved = checkpoint.peek(path).section
                model = deepcopy(section["model"])
                keep_former_defaults(model, saved["model"], typed=typed)
                if not is_like(saved, {**section, "model": model}):
                    break
                was_like = True
                return checkpoint.read(path), [*_passed_over(passed), *_fallen_back(problems, path)]
            except ValueError as error:
                problems.append(str(error))
        else:
            if problems and (was_like or is_config_of(run, cfg, former=former_defaults(typed))):
                raise _none_whole(run, problems)
        passed += problems
    return None, _passed_over(passed)


def _check_home(path: Path) -> None:
    """Refuse a run's own file that is a link to another run's: going on would write there."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if os.path.lexists(path) and Path(os.path.realpath(path)).parent not in (
        folder.resolve() / "checkpoints",
        folder.resolve(),
    ):
        raise ValueError(f"{path} is a link that leads out of {folder}: a run goes on in its own folder only")


def _fallen_back(problems: Sequence[str], path: Path) -> list[str]:
    return [f"warning: {problem}; going on from {path} instead" for problem in problems]


def _passed_over(problems: Sequence[str]) -> list[str]:
    """Return a line for checkpoints of other runs that ckpt=auto could not open, the first of them named."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return [f"warning: ckpt=auto passes over what does not open: {problems[0]}{more}"] if problems else []


def _none_whole(run: Path, problems: Sequence[str]) -> ValueError:
    return ValueError(
        f"no checkpoint of {run} is whole, and ckpt=auto starts nothing over: {'; '.join(problems)}; to start over, "
        f"leave ckpt=auto out, name another folder (run_dir=...) or delete this one"
    )


def _is_same_file(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.read(path)
    except ValueError:
        return False
    return True
