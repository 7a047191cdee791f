import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from performer_lm.training.output import lasting_output


class Full(io.StringIO):
    """A stream whose every write fails in the way it is given."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.fixture
def broken_pipe() -> Iterator[Any]:
    """Return a stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        yield stream  # and closing it fails where what is buffered still waits


def say_everything() -> None:
    print("a line")
    sys.stdout.write("half")
    sys.stdout.flush()
    print("to the other", file=sys.stderr)
    Console().print("a sample: \u2014 \udcff \ufffd")
    with Progress(console=Console(force_terminal=True)) as bar:
        bar.advance(bar.add_task("a bar", total=2))


def test_a_reader_that_has_gone_costs_nothing(broken_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", broken_pipe)
    monkeypatch.setattr(sys, "stderr", broken_pipe)
    with pytest.raises(BrokenPipeError):
        say_everything()
    with lasting_output():
        say_everything()
    print("nor does what comes after", flush=True)
    assert sys.stdout is broken_pipe


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BlockingIOError(11, "busy"),
                                   ValueError("I/O operation on closed file"), RuntimeError("reentrant call"),
                                   OSError(5, "Input/output error")], ids=str)  # fmt: skip
def test_no_error_of_a_stream_gets_through(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full(error))
    monkeypatch.setattr(sys, "stderr", Full(error))
    with lasting_output():
        say_everything()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_spelled_out(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with lasting_output():
        print("x\u2713\udcffy")
        Console(file=sys.stdout).print("\u65e5")
    text = written.getvalue().decode(encoding)
    assert text.startswith("x\u2713\\udcffy" if encoding == "utf-8" else "x\\u2713\\udcffy")
    assert ("\u65e5" if encoding == "utf-8" else "\\u65e5") in text


def test_streams_that_are_not_there_stay_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_output():
        print("nowhere")
        assert sys.stdout is None
