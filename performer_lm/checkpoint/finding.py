"""Which checkpoint file a name means, and which files a run has."""

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from performer_lm.writing import entries_below

_STEP = re.compile(r"step=(\d{1,18})(?:-val_bpb=[\d.]+)?\.ckpt")


def name_of(step: int, val_bpb: float | None = None) -> str:
    """Return the file name of a checkpoint: `step=000500-val_bpb=1.832.ckpt`, the score where it was measured."""
    score = "" if val_bpb is None else f"-val_bpb={val_bpb:.3f}"
    return f"step={step:06d}{score}.ckpt"


def named_by_step(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that `name_of` named, the latest step first."""
    found = [path for path in folder.glob("step=*.ckpt") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path), reverse=True)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint that `name_of` named."""
    found = _STEP.fullmatch(path.name)
    assert found, f"{path} is not named by its step"
    return int(found[1])


def candidates(run: Path) -> list[Path]:
    """Return the checkpoints of a run: the last one saved, then the others, the latest step first.

    A link that leads to no file is among them, and a folder that has a checkpoint's name: reading it says so.
    """
    folder = run / "checkpoints"
    last = folder / "last.ckpt"
    target = folder / last.readlink().name if last.is_symlink() else last
    first = [target] if os.path.lexists(last) else []
    return first + [path for path in named_by_step(folder) if path not in first]


def newest_runs(runs: Path) -> list[Path]:
    """Return the folders below `runs` that hold checkpoints, the one saved to last first."""
    folders = {path.parent for path in _below(runs) if path.parent.name == "checkpoints"}
    return [folder.parent for folder in sorted(folders, key=_saved_at, reverse=True)]


def _below(folder: Path) -> Iterator[Path]:
    """Yield paths with a checkpoint's name below a folder."""
    return (Path(entry.path) for entry in entries_below(folder) if entry.name.endswith(".ckpt"))


def _saved_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def holder(path: Path) -> Path:
    """Return the run folder that a checkpoint file belongs to, links followed."""
    folder = Path(os.path.realpath(path)).parent  # where `resolve` fails on a loop of links
    return folder.parent if folder.name == "checkpoints" else folder


def find(
    name: str, *, prefer: tuple[str, ...] = ("best", "last"), runs: Path = Path("runs"), key: str = "ckpt"
) -> Path:
    """Return the checkpoint file that `name` means: a file, a run folder, or `latest` for the newest run.

    Args:
        name: as the user typed it.
        prefer: names of files in a run folder, first choice first.
        runs: folder of runs.
        key: the option that the name was typed for.

    Raises:
        ValueError: when there is none, listing the nearest checkpoints; for an address that is not of this machine.
    """
    if "://" in name:
        raise ValueError(f"{key}={name} is not opened from elsewhere: download it, check its sha256, and give its path")
    path = runs / "latest" if name == "latest" else Path(os.path.expanduser(name))
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        for choice in prefer:
            found = folder / f"{choice}.ckpt"
            if os.path.lexists(found):
                return found  # be it no file: reading it says so, where the next choice would be another one in silence
    wanted = "is no file" if os.path.lexists(path) else "does not exist"
    wanted = "is a folder that holds no checkpoint" if path.is_dir() else wanted
    existing = sorted({str(found) for found in (*islice(_below(runs), 1000), *path.parent.glob("*.ckpt"))})
    nearest = get_close_matches(name, existing, n=3, cutoff=0.3) or existing[-3:]
    hint = f"; nearest: {', '.join(nearest)}" if nearest else "; there are no checkpoints yet: run train.py first"
    raise ValueError(f"{key}={name} {wanted}{hint}")
