"""What a run says to people: its log, its closing card, and the link to the newest run."""

import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

log = logging.getLogger("performer_lm")


@contextmanager
def open_log(path: Path, console: Console) -> Iterator[None]:
    """Send the logger `performer_lm` to the console and, appended, to `path`, while the context lasts."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    handlers = [_ConsoleHandler(console), file]
    before = log.handlers[:], log.propagate, log.level
    log.handlers, log.propagate = handlers, False
    log.disabled = False  # which `logging.config` leaves behind where another tool has set up logging
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, log.propagate, level = before
        log.setLevel(level)
        file.close()


class _ConsoleHandler(logging.Handler):
    """Print lines above a running progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line as it is."""
        self.console.print(record.getMessage(), markup=False, soft_wrap=True)


def point_latest(folder: Path) -> None:
    """Make `runs/latest` point to the newest run, where links exist; the link is replaced in one move."""
    runs = next((parent for parent in folder.parents if parent.name == "runs"), None)
    if runs is None:
        return
    temporary = runs / f"latest.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.resolve().relative_to(runs.resolve()), target_is_directory=True)
    os.replace(temporary, runs / "latest")


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
