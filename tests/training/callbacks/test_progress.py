import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from performer_lm.training import prepare as preparing
from performer_lm.training.run import Run

Start = Callable[..., Run]


@pytest.fixture
def shown(start: Start, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function from what a console is to what a tiny run shows on it."""

    def show(**console: Any) -> str:
        out = io.StringIO()
        monkeypatch.setattr(preparing, "Console", lambda **options: Console(file=out, width=100, **console, **options))
        start("trainer.max_steps=6", "trainer.log_every=2", "trainer.val_every=3", "run_dir=runs/a").fit()
        return out.getvalue()

    return show


def test_without_a_terminal_there_are_plain_lines(shown: Callable[..., str]) -> None:
    out = shown()
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/6", "3", "4/6", "6/6", "6"]
    assert "tokens/s" in lines[0]
    assert "val/bpb" in lines[1]
    assert "\x1b" not in out
    assert "tokens/s" in Path("runs/a/train.log").read_text()


def test_a_terminal_shows_a_bar_instead(shown: Callable[..., str]) -> None:
    out = shown(force_terminal=True)
    assert "\x1b[" in out
    assert "━" in out
    assert "step 2/6  loss" not in out
    assert "val/bpb" in out


def test_no_color_is_honoured(shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = shown(force_terminal=True)
    assert "━" in out
    assert not any(f"\x1b[{code}" in out for code in ("3", "38", "9"))  # colours; moving the cursor is none


def test_a_dumb_terminal_gets_lines(shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = shown(force_terminal=True)
    assert "step 2/6  loss" in out
    assert "━" not in out
