"""Which checkpoint file a name means, and which files a run has."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

_STEP = re.compile(r"step=(\d+)(?:-val_bpb=[\d.]+)?\.ckpt")


def name_of(step: int, val_bpb: float | None = None) -> str:
    """Return the file name of a checkpoint: `step=000500-val_bpb=1.832.ckpt`, the score where it was measured."""
    score = "" if val_bpb is None else f"-val_bpb={val_bpb:.3f}"
    return f"step={step:06d}{score}.ckpt"


def named_by_step(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that `name_of` named, the latest step first."""
    found = [(int(match[1]), path) for path in folder.glob("step=*.ckpt") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def candidates(run: Path) -> list[Path]:
    """Return the checkpoints that a run can go on from: the last one saved, then the others, the latest step first."""
    folder = run / "checkpoints"
    last = folder / "last.ckpt"
    first = [folder / last.readlink()] if last.is_symlink() else [last]
    others = [path for path in named_by_step(folder) if path not in first]
    return [path for path in (*first, *others) if path.is_file()]


def newest_runs(runs: Path) -> Iterator[Path]:
    """Yield the folders below `runs` that hold checkpoints, the one saved to last first."""
    folders = {path.parent for path in runs.glob("**/checkpoints/*.ckpt") if not path.parent.parent.is_symlink()}
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        yield folder.parent


def holder(path: Path) -> Path:
    """Return the run folder that a checkpoint file belongs to, links followed."""
    folder = path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


def find(name: str, *, prefer: tuple[str, ...] = ("best", "last"), runs: Path = Path("runs")) -> Path:
    """Return the checkpoint file that `name` means: a file, a run folder, or `latest` for the newest run.

    Args:
        name: as the user typed it.
        prefer: which file of a run folder, first choice first.
        runs: where runs lie.

    Raises:
        ValueError: when there is none, listing the nearest checkpoints; for an address that is not of this machine.
    """
    if "://" in name:
        raise ValueError(f"ckpt={name} is not opened from elsewhere: download it, check its sha256, and give its path")
    path = runs / "latest" if name == "latest" else Path(name)
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        for choice in prefer:
            if (folder / f"{choice}.ckpt").is_file():
                return folder / f"{choice}.ckpt"
    wanted = "holds no checkpoint" if path.is_dir() else "does not exist"
    existing = sorted({str(found) for found in (*runs.glob("**/*.ckpt"), *path.parent.glob("*.ckpt"))})
    nearest = get_close_matches(name, existing, n=3, cutoff=0.3) or existing[-3:]
    hint = f"; nearest: {', '.join(nearest)}" if nearest else "; there are no checkpoints yet: run train.py first"
    raise ValueError(f"ckpt={name} {wanted}{hint}")
