"""The folder that the jobs of a sweep share, and what became of those that failed.

A job may run in another process or on another machine, at another time. So the folder is chosen once, before the first
one starts, and handed down in the environment.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.core.utils import env_override

from performer_lm.writing import append_text

FOLDER = "PERFORMER_LM_SWEEP"
FAILURES = "failures.jsonl"


@dataclass(frozen=True)
class Sweep:
    """How an entry point runs sweeps.

    Args:
        folder_key: the config key that names the folder.
        close: called with the folder once all jobs have come to an end.
    """

    folder_key: str
    close: Callable[[Path], None]


def sweep_folder() -> str | None:
    """Return the folder of the sweep that this process runs a job of."""
    return os.environ.get(FOLDER)


@contextmanager
def sweeping(sweep: Sweep, folder: Path) -> Iterator[None]:
    """Hand the folder down while the jobs run; close the sweep however they end."""
    try:
        with env_override({FOLDER: str(folder)}):
            yield
    finally:
        if folder.is_dir() and any(folder.iterdir()):
            sweep.close(folder)


def note_failure(job: int, overrides: Sequence[str], *, code: int, error: str) -> None:
    """Keep the error of a failed job, for the table at the sweep's end."""
    folder = sweep_folder()
    if folder is None:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    line = {"job": job, "overrides": list(overrides), "code": code, "error": error}
    append_text(Path(folder) / FAILURES, json.dumps(line) + "\n")
