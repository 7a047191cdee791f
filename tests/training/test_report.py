import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from performer_lm.training.report import card, open_log, point_latest

SUMMARY = {"steps": 10, "tokens": 20480, "tokens_per_second": 1234.5, "best_val_bpb": 1.75, "folder": "runs/a b"}


def test_the_card_names_the_next_commands() -> None:
    text = card(SUMMARY, resume="python train.py ckpt=runs/a", prompt="def main(")
    assert "20,480  (1,234 tokens/s)" in text
    assert "best val bpb  1.7500" in text
    assert """python generate.py 'ckpt=runs/a b' prompt="def main(\"""" in text
    assert text.endswith("python train.py ckpt=runs/a")
    assert "accuracy" not in text
    assert "val accuracy  87.50%" in card({**SUMMARY, "last_val_accuracy": 0.875}, resume="", prompt="")


def test_the_card_of_a_model_that_does_not_decode_measures_it_on_what_its_run_held_out() -> None:
    text = card(SUMMARY, resume="", prompt=None)
    assert "generate.py" not in text
    assert "python evaluate.py 'ckpt=runs/a b'\n" in text


def test_lines_go_to_the_console_and_the_file(tmp_path: Path) -> None:
    log, out = logging.getLogger("performer_lm"), io.StringIO()
    before = log.handlers[:]
    with open_log(tmp_path / "train.log", Console(file=out, width=20)):
        log.info("a line with [brackets] that is wider than the console")
    log.info("after")
    assert out.getvalue() == "a line with [brackets] that is wider than the console\n"
    assert (tmp_path / "train.log").read_text().endswith("than the console\n")
    assert log.handlers == before


def test_latest_moves_to_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/day/one", "runs/day/two"):
        Path(name).mkdir(parents=True)
        point_latest(Path(name))
        assert Path("runs/latest").resolve() == Path(name).resolve()
    Path("elsewhere").mkdir()
    point_latest(Path("elsewhere"))
    assert Path("runs/latest").resolve() == Path("runs/day/two").resolve()
