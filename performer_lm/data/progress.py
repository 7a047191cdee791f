"""Progress of preparing data: a bar on a terminal, one line at the end elsewhere."""

import sys
from types import TracebackType
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@final
class PreparationProgress:
    """A bar on stderr, one stage after another; shown only on a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("data: {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._stage = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, stage: str, *, num_bytes: int | None = None) -> None:
        """Begin a stage of so many bytes; None for one whose length is not known."""
        self._bar.reset(self._stage, description=stage, total=num_bytes)

    def add(self, num_bytes: int) -> None:
        self._bar.advance(self._stage, num_bytes)


def say(line: str) -> None:
    """Print a line about the data to stderr."""
    print(f"data: {line}", file=sys.stderr, flush=True)
