"""Output that never costs a run: readers may go, disks fill up, terminals lack characters.

A run is worth more than what it prints, and `train.log` has that too.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let whatever is printed while the context lasts be lost rather than fail."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Lasting(stream)) if stream else stream for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A stream that takes any text: characters that its encoding lacks are spelled out, and a closed one is left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._attempt(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., Any], *text: str) -> None:
        try:
            action(*text)
        except UnicodeEncodeError:
            raise
        except BlockingIOError:  # a terminal that is slow takes the next line again
            pass
        except OSError:
            self._leave()
        except (ValueError, RuntimeError):  # closed in this process, or interrupted by a signal's handler that prints
            pass

    def _leave(self) -> None:
        """Let all that comes go nowhere, so that neither the next line nor the interpreter's end meets the error."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
