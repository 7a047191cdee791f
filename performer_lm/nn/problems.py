"""Gather everything that is wrong with a constructor's arguments, so that all of it is told at once."""

from collections.abc import Iterator
from contextlib import contextmanager


class Problems:
    """What has been found wrong so far, a line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def unless(self, right: bool, text: str) -> None:
        """Note `text` unless `right`."""
        if not right:
            self.lines.append(text)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Note the ValueError that the block raises, and go on after it."""
        try:
            yield
        except ValueError as error:
            self.lines += str(error).splitlines()

    def raise_any(self) -> None:
        """Raise ValueError with all that was noted, each line once, if there is any."""
        if self.lines:
            raise ValueError("\n".join(dict.fromkeys(self.lines)))
