import io
import logging
import resource
from pathlib import Path

import pytest
from rich.console import Console

from performer_lm.training.report import card, open_log, point_latest, spared

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


def test_a_log_that_cannot_be_written_is_one_warning_and_the_console_goes_on(tmp_path: Path) -> None:
    log, out = logging.getLogger("performer_lm"), io.StringIO()
    (tmp_path / "train.log").mkdir()
    with open_log(tmp_path / "train.log", Console(file=out)):
        log.info("one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with open_log(tmp_path / "full.log", Console(file=out)):
            log.info("two")
            log.info("three, which is longer than what is left")
            log.info("four")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = out.getvalue().splitlines()
    assert told[0].startswith("warning: train.log could not be written: ")
    assert told[1:4] == ["one", "two", "three, which is longer than what is left"]
    assert told[4].startswith("warning: full.log could not be written: ")
    assert told[5:] == ["four"]


def test_any_text_goes_into_the_log(tmp_path: Path) -> None:
    log = logging.getLogger("performer_lm")
    with open_log(tmp_path / "train.log", Console(file=io.StringIO())):
        log.info("a name of bytes: %s", b"\xff".decode(errors="surrogateescape"))
    assert (tmp_path / "train.log").read_text().endswith("a name of bytes: \\udcff\n")


def test_what_fails_beside_a_run_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with spared("the card"):
        raise KeyError("folder\nand more")
    with pytest.raises(KeyboardInterrupt), spared("the card"):
        raise KeyboardInterrupt
    assert [len(message.splitlines()) for message in caplog.messages] == [1]


@pytest.mark.parametrize("kind", ["folder", "file", "runs elsewhere"])
def test_a_latest_that_cannot_be_written_is_one_warning(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    if kind == "folder":
        Path("runs/latest/full").mkdir(parents=True)
    elif kind == "file":
        monkeypatch.setattr(Path, "symlink_to", Path.rmdir)  # a disk without links
    else:
        Path("elsewhere").mkdir()
        Path("runs/a").rmdir()
        Path("runs/a").symlink_to("../elsewhere")
    point_latest(Path("runs/a"))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("warning: runs/latest could not be written: ")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a", *(["latest"] if kind == "folder" else [])]


def test_latest_moves_to_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/day/one", "runs/day/two"):
        Path(name).mkdir(parents=True)
        point_latest(Path(name))
        assert Path("runs/latest").resolve() == Path(name).resolve()
    Path("elsewhere").mkdir()
    point_latest(Path("elsewhere"))
    assert Path("runs/latest").resolve() == Path("runs/day/two").resolve()
