import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation import interactive
from performer_lm.generation.interactive import COMMANDS, breaking_off, interact
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.session import Session, stream_text
from performer_lm.model import PerformerLM

RULES = Sampler(temperature=0, banned_tokens=[*range(33), *range(127, 257)], no_repeat_ngram_size=1)
ASCII: dict[str, Any] = {"max_new_tokens": 5, "sampler": RULES}
Talk = Callable[..., str]


@pytest.fixture
def model(lively_model: Callable[..., PerformerLM]) -> PerformerLM:
    return lively_model("attn=hybrid", "attn.pattern=[favor,flash]", vocab_size=257)


@pytest.fixture
def talk(model: PerformerLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Return a function that types lines and returns the screen without its greeting."""
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, model: PerformerLM = model) -> str:
        typed: Iterator[str] = iter(lines)

        def read_line(prompt: str) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read_line)
        screen = io.StringIO()
        interact(Session(model, ByteTokenizer(), seed=0, **ASCII), Console(file=screen, width=80))
        return screen.getvalue().partition("\n")[2]

    return run


def continuation(model: PerformerLM, text: str) -> str:
    return "".join(stream_text(model, ByteTokenizer(), text, seed=0, **ASCII))


def test_turns_are_one_text_until_it_is_reset(model: PerformerLM, talk: Talk) -> None:
    one = f"line{continuation(model, 'line')}"
    two = f"{one} and{continuation(model, f'{one} and')}"
    three = two + continuation(model, two)
    screen = talk("line", " and", "", "/history", "/reset", "line")
    assert screen.splitlines() == [one[4:], two[len(one) + 4 :], three[len(two) :], three, one[4:]]


def test_a_text_is_saved_and_loaded(model: PerformerLM, talk: Talk) -> None:
    first, told, second, third = talk("line", "/save my state", "", "/load my state", "/history", "").splitlines()
    assert (second, third) == (f"line{first}", told)
    assert Path("my state").exists()


def test_a_slash_of_the_text_is_typed_twice(model: PerformerLM, talk: Talk) -> None:
    assert talk("//usr").splitlines() == [continuation(model, "/usr")]
    assert talk("//[b]", "/history").splitlines()[1].startswith("/[b]")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sav a", "error: /sav is no command; did you mean /save?; /help lists them"),
        ("/save", "error: /save needs a file: /save my.state"),
        ("/load none", "error: none: no such file or directory"),
        ("/save none/a", "error: none/a: cannot be written (no such file or directory)"),
        ("\udcff", "error: text cannot be written as UTF-8: '\\udcff' at character 0"),
    ],
)
def test_a_mistake_is_told_and_the_text_goes_on(model: PerformerLM, talk: Talk, line: str, message: str) -> None:
    wanted = talk("line", "")
    assert talk("line", line, "").splitlines() == [wanted.splitlines()[0], message, wanted.splitlines()[1]]


def test_help_names_every_command_and_quit_leaves(talk: Talk) -> None:
    assert [line.split()[0] for line in talk("/help", "/quit", "line").splitlines()] == list(COMMANDS)


def test_an_interrupt_breaks_a_turn_off_between_tokens(
    model: PerformerLM, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, plain = continuation(model, "line"), Console.print

    def interrupting(console: Console, *objects: str, **options: Any) -> None:
        plain(console, *objects, **options)
        if objects and objects[0] == whole[1]:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(Console, "print", plain)

    monkeypatch.setattr(interactive.Console, "print", interrupting)
    begun, rest = talk("line", "").splitlines()
    assert begun == whole[: len(begun)]
    assert len(begun) < 5
    assert (begun + rest)[:5] == whole


def test_an_interrupt_elsewhere_is_what_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with breaking_off() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(1)
    assert signal.getsignal(signal.SIGINT) is before
