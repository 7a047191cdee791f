"""The folder of a run: chosen and held before anything is written to it, and left as it was where nothing comes of it.

config.yaml  train.log  metrics.{jsonl,csv,png}  samples.txt  summary.json
checkpoints/{step=N-val_bpb=X.ckpt, best.ckpt, last.ckpt}      best and last are links
"""

import errno
import os
import re
from collections.abc import Collection, Mapping
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from performer_lm.training.lock import RunLock
from performer_lm.writing import check_plain, entries_below, read_start, replace_text, temporary_of, unwritable

FILES = (
    *("config.yaml", "train.log", "metrics.jsonl", "metrics.csv", "metrics.png", "samples.txt", "summary.json"),
    *("run.lock", "wandb_id"),
)
RESULTS = ("model", "data", "objective", "optimizer", "schedule", "seed", "init")  # what of a config makes its results
_SECTION = re.compile(r"^(\w+):(.*\n(?:[ -].*\n)*)", re.MULTILINE)  # of a written config: read as text, never parsed
FOLDERS = ("checkpoints", "nonfinite", "tensorboard", "wandb")


class RunFolder:
    """A folder that this process may write a run to; on ranks but the first it is a name only.

    Args:
        path: the folder, which is there.
        writes: whether this process is the one that writes.
        made: the folders that were made for it, the outermost first.

    Raises:
        ValueError: where another process has it.
        OSError: where it cannot be written to, or something in it leads elsewhere.
    """

    def __init__(self, path: Path, *, writes: bool, made: list[Path] | None = None) -> None:
        self.path = path
        self._made = made or []
        self._lock: RunLock | None = None
        if writes:
            try:
                check_own(path)
                self._lock = RunLock(path)
                self._try_out()
            except BaseException:
                self.release()
                raise

    @classmethod
    def create(cls, wanted: Path, *, writes: bool) -> "RunFolder":
        """Make a new folder; where the name is taken, be it this very moment, it gets a suffix."""
        names = chain([wanted.name], (f"{wanted.name}-{number}" for number in count(2)))
        for path in map(wanted.with_name, names):
            if not writes:
                if not path.exists():
                    return cls(path, writes=False)
                continue
            made = _make_parents(path)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return cls(path, writes=True, made=[*made, path])
        raise AssertionError("there is always a next number")

    @classmethod
    def take(cls, path: Path, *, writes: bool) -> "RunFolder":
        """Take this very folder, whatever is in it, and make it where there is none."""
        made = []
        if writes and not path.is_dir():
            made = _make_parents(path)
            path.mkdir()
            made.append(path)
        return cls(path, writes=writes, made=made)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self, cfg: DictConfig) -> None:
        replace_text(self.path / "config.yaml", _to_yaml(cfg), sync=False)  # each start writes it again

    def release(self) -> None:
        """Let other processes have the folder, and remove the folders that were made for it and are empty."""
        if self._lock:
            self._lock.release()
        for folder in reversed(self._made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _try_out(self) -> None:
        """Delete remains of killed writes, and try to write: a full disk is better found now than after hours."""
        for stale in self.path.glob("*.tmp"):
            if re.fullmatch(r".+\.\d+\.tmp", stale.name):  # as `temporary_of` names them
                stale.unlink(missing_ok=True)
        if not self.checkpoints.is_dir():
            self.checkpoints.mkdir()
            self._made.append(self.checkpoints)
        for folder in (self.path, self.checkpoints):
            probe = temporary_of(folder / "probe")
            try:
                with probe.open("xb") as file:
                    file.write(bytes(2**16))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise unwritable(folder, error) from error
            finally:
                probe.unlink(missing_ok=True)


def is_config_of(folder: Path, cfg: DictConfig, *, former: Mapping[str, list[Any]] | None = None) -> bool:
    """Return True if the `config.yaml` of a folder agrees with `cfg` on all that results depend on.

    Options by the names of `former` may have one of the values there instead.
    """
    try:
        written = read_start(folder / "config.yaml", 2**20).decode(errors="replace")
    except OSError:
        return False
    one, other = (dict(_SECTION.findall(text)) for text in (written, _to_yaml(cfg)))
    kept = {f"{name}: {value}" for name, values in (former or {}).items() for value in values}
    return all(name in one and _agree(one[name], other[name], kept) for name in RESULTS)


def _agree(written: str, wanted: str, kept: Collection[str]) -> bool:
    """Return True if two sections are the same, but for lines of the first that are `kept` in the place of others."""
    pairs = zip_longest(map(str.strip, written.splitlines()), map(str.strip, wanted.splitlines()), fillvalue="")
    return all(a == b or (a in kept and a.partition(":")[0] == b.partition(":")[0]) for a, b in pairs)


def _to_yaml(cfg: DictConfig) -> str:
    return OmegaConf.to_yaml(cfg, resolve=True)


def check_own(folder: Path) -> None:
    """Refuse a folder in which something that a run writes leads out of the folder.

    Raises:
        OSError: naming it.
    """
    for name in FILES:
        check_plain(folder / name)
    for name in FOLDERS:
        inside = folder / name
        if inside.is_symlink() or (os.path.lexists(inside) and not inside.is_dir()):
            raise OSError(errno.ENOTDIR, "is no folder of its own, and a run keeps files in it", str(inside))
        for entry in entries_below(inside):
            if Path(entry.path).match("wandb/*run-*/logs/debug-core.log"):
                continue  # wandb links it to its cache, and writes to none but a new session's
            if not entry.is_symlink():
                if not entry.is_dir():
                    check_plain(Path(entry.path))
            elif not Path(os.path.realpath(entry)).is_relative_to(inside.resolve()):
                raise OSError(errno.EPERM, "is a link that leads out of the run's folder", entry.path)


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above a path, and return those that were not there, the outermost first."""
    made = [parent for parent in path.parents if not parent.exists()][::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    return made
