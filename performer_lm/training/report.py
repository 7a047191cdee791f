"""A run's log, its closing card, and the link to the newest run."""

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from performer_lm.wording import first_line
from performer_lm.writing import open_to_append

log = logging.getLogger("performer_lm")


@contextmanager
def spared(name: str) -> Iterator[None]:
    """Let a picture, a table or a note fail with one warning: none of them is worth a run."""
    try:
        yield
    except Exception as error:
        log.warning("warning: %s could not be written: %s", name, first_line(error))


@contextmanager
def open_log(path: Path, console: Console) -> Iterator[None]:
    """Send the logger `performer_lm` to the console and, appended, to `path`, while the context lasts."""
    handlers: list[logging.Handler] = [_ConsoleHandler(console)]
    before = log.handlers[:], log.propagate, log.level
    log.handlers, log.propagate = handlers, False
    log.disabled = False  # which `logging.config` leaves behind where another tool has set up logging
    log.setLevel(logging.INFO)
    try:
        with spared(path.name):
            log.addHandler(_LogFile(open_to_append(path), name=path.name))
        yield
    finally:
        opened, (log.handlers, log.propagate, level) = log.handlers, before
        log.setLevel(level)
        for handler in opened:
            handler.close()


class _ConsoleHandler(logging.Handler):
    """Print lines above a running progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage(), markup=False, soft_wrap=True)


class _LogFile(logging.StreamHandler[TextIO]):
    """Append lines to a file; once it cannot be written, say so on the console and leave it."""

    def __init__(self, stream: TextIO, *, name: str) -> None:
        super().__init__(stream)
        self.set_name(name)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:
        log.removeHandler(self)
        self.close()
        log.warning("warning: %s could not be written: %s", self.name, sys.exc_info()[1])

    def close(self) -> None:
        """Close the file, whatever of it could not be written."""
        with suppress(OSError):
            self.stream.close()
        super().close()


def point_latest(folder: Path) -> None:
    """Make `runs/latest` point to the newest run, where links exist; the link is replaced in one move."""
    runs = next((parent for parent in folder.parents if parent.name == "runs"), None)
    if runs is None:
        return
    with spared(str(runs / "latest")):
        temporary = runs / f"latest.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.resolve().relative_to(runs.resolve()), target_is_directory=True)
        try:
            os.replace(temporary, runs / "latest")
        finally:
            temporary.unlink(missing_ok=True)


def card(summary: Mapping[str, Any], *, resume: str, prompt: str | None) -> str:
    """Return the lines that close a run, with commands that go on from it; no prompt: the model writes no text."""
    folder = shlex.quote(f"ckpt={summary['folder']}")
    accuracy = summary.get("last_val_accuracy")
    if prompt is not None:
        use = f'sample        python generate.py {folder} prompt="{prompt}"'
    else:
        use = f"measure       python evaluate.py {folder}"
    return "\n".join(
        (
            "--- done ---",
            f"steps         {summary['steps']:,}",
            f"tokens        {summary['tokens']:,}  ({summary['tokens_per_second']:,.0f} tokens/s)",
            f"best val bpb  {summary['best_val_bpb']:.4f}",
            *([] if accuracy is None else [f"val accuracy  {accuracy:.2%}"]),
            f"files         {summary['folder']}",
            use,
            f"resume        {resume}",
        )
    )
