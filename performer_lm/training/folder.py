"""The folder of a run: chosen and held before anything is written to it, and left as it was where nothing comes of it.

config.yaml  train.log  metrics.{jsonl,csv,png}  samples.txt  summary.json
checkpoints/{step=N-val_bpb=X.ckpt, best.ckpt, last.ckpt}      best and last are links
"""

from itertools import chain, count
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from performer_lm.training.lock import RunLock
from performer_lm.training.report import point_latest


class RunFolder:
    """A folder that this process may write a run to; on ranks but the first it is a name only.

    Args:
        path: the folder.
        writes: whether this process is the one that writes.
        made: the folders that were made for it, the outermost first.
    """

    def __init__(self, path: Path, *, writes: bool, made: list[Path] | None = None) -> None:
        self.path = path
        self._made = made or []
        self._lock = RunLock(path) if writes else None

    @classmethod
    def create(cls, wanted: Path, *, writes: bool) -> "RunFolder":
        """Make a new folder; where the name is taken, be it this very moment, it gets a suffix."""
        names = chain([wanted.name], (f"{wanted.name}-{number}" for number in count(2)))
        for path in map(wanted.with_name, names):
            if not writes:
                if not path.exists():
                    return cls(path, writes=False)
                continue
            made = [parent for parent in (path, *path.parents) if not parent.exists()][::-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return cls(path, writes=True, made=made)
        raise AssertionError("there is always a next number")

    @property
    def checkpoints(self) -> Path:
        """Return where checkpoints lie."""
        return self.path / "checkpoints"

    def open(self, cfg: DictConfig) -> None:
        """Keep the config in the folder and make it the newest run."""
        OmegaConf.save(cfg, self.path / "config.yaml", resolve=True)
        point_latest(self.path)

    def release(self) -> None:
        """Let other processes have it."""
        if self._lock:
            self._lock.release()

    def abandon(self) -> None:
        """Release it, and take away what was made for it if it is still empty."""
        self.release()
        for folder in reversed(self._made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
