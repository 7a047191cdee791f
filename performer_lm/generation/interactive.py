"""A text written by turns at a terminal: a line is read and continued, a command begins with a slash."""

import importlib
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from rich.console import Console

from performer_lm.generation.session import Session
from performer_lm.generation.states import load_state, save_state
from performer_lm.wording import did_you_mean, message

COMMANDS: Final = {
    "/reset": "begin a new text",
    "/save": "FILE  write the state of the text to a file",
    "/load": "FILE  go on from a state in a file",
    "/history": "show the text so far",
    "/help": "show this",
    "/quit": "leave, as Ctrl-D does; Ctrl-C breaks off a turn",
}


def interact(session: Session, console: Console) -> None:
    """Read lines and continue the text by each, until the input ends; an empty line continues it as it is.

    Ctrl-C breaks off a turn between two tokens. `//` at the start of a line stands for a slash of the text.
    """
    with suppress(ImportError):  # no such library on Windows: then lines have no history to go back to
        importlib.import_module("readline")
    console.print("[dim]type text to continue, /help for commands, Ctrl-D to leave[/dim]", highlight=False)
    while True:
        try:
            line = input("> ")  # not the console's, whose prompt is lost where a line is edited
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                _obey(line, session, console)
            else:
                session.read(line.removeprefix("/") if line.startswith("//") else line)
                _write(session, console)
        except BrokenPipeError:  # the screen has gone
            raise
        except (ValueError, OSError) as error:
            console.print(f"error: {message(error)}", style="red", markup=False, highlight=False, soft_wrap=True)


def _obey(line: str, session: Session, console: Console) -> None:
    command, _, name = line.strip().partition(" ")
    path = Path(name.strip()).expanduser()
    if command in ("/save", "/load") and not name:
        raise ValueError(f"{command} needs a file: {command} my.state")
    if command == "/reset":
        session.resume(None)
    elif command == "/save":
        save_state(path, session.read(), session.model, session.tokenizer)
    elif command == "/load":
        session.resume(load_state(path, session.model, session.tokenizer))
    elif command == "/history":
        console.print(session.text, markup=False, highlight=False, soft_wrap=True)
    elif command == "/help":
        for each, told in COMMANDS.items():
            console.print(f"{each:9} {told}", markup=False, highlight=False)
    else:
        raise ValueError(f"{command} is no command{did_you_mean(command, COMMANDS)}; /help lists them")


def _write(session: Session, console: Console) -> None:
    with breaking_off() as asked, closing(session.write()) as pieces:
        for piece in pieces:
            console.print(piece, end="", style="cyan", markup=False, highlight=False, soft_wrap=True)
            if asked.is_set():
                break
    console.print()


@contextmanager
def breaking_off() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event instead of raising, for a state half way through a token is no state."""
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
