import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from performer_lm.training.output import lasting_output
from performer_lm.training.sweep import close_sweep, collect, table

SUMMARY = {"parameters": 1000, "tokens_per_second": 50.0, "peak_memory": 2**20, "best_val_bpb": 2.5}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Return the folder of a sweep: two jobs done, one failed before it had a folder, one killed."""
    jobs: dict[int, dict[str, Any] | None] = {
        0: {**SUMMARY, "overrides": ["attn=favor", "data.path=a b.txt", "optimizer.lr=0.01234567890"]},
        1: {**SUMMARY, "best_val_bpb": 2.25, "overrides": ["attn=flash", "data.path=a b.txt"]},
        3: None,
    }
    for number, summary in jobs.items():
        job = tmp_path / str(number)
        job.mkdir()
        (job / "config.yaml").touch()
        if summary:
            (job / "summary.json").write_text(json.dumps(summary))
    failures = [
        {"job": 2, "overrides": ["attn=exact", "data.path=a b.txt"], "code": 3, "error": "the loss is nan"},
        {"job": 1, "overrides": ["attn=flash"], "code": 4, "error": "out of memory; it went well the second time"},
    ]
    (tmp_path / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in failures))
    (tmp_path / ".submitit").mkdir()
    return tmp_path


def test_every_job_is_a_row_however_it_ended(sweep: Path) -> None:
    rows = collect(sweep)
    assert [row["job"] for row in rows] == [0, 1, 2, 3]
    assert [row["ended"] for row in rows] == ["done", "done", "the loss is nan", "unfinished"]
    assert [row["attn"] for row in rows] == ["favor", "flash", "exact", ""]
    assert rows[0]["peak memory (MiB)"] == 1.0
    assert "data.path" not in rows[0]  # the same for all


def test_the_table_marks_the_best_and_the_csv_keeps_all_digits(sweep: Path) -> None:
    close_sweep(sweep)
    with (sweep / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["val bpb"] for row in rows] == ["2.5", "2.25", "", ""]
    assert rows[0]["optimizer.lr"] == "0.01234567890"
    assert (sweep / "sweep.png").stat().st_size > 1000
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(collect(sweep), title="a sweep"))
    shown = console.export_text()
    assert "0.012346" in shown
    assert "the loss is nan" in shown


def test_nothing_is_written_where_nothing_ran(tmp_path: Path) -> None:
    close_sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_over_tasks_tells_their_accuracy(sweep: Path) -> None:
    assert "val accuracy" not in collect(sweep)[0]
    (sweep / "0" / "summary.json").write_text(json.dumps({**SUMMARY, "overrides": [], "last_val_accuracy": 0.875}))
    close_sweep(sweep)
    rows = collect(sweep)
    assert [row["val accuracy"] for row in rows] == [0.875, "", "", ""]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(rows, title="a sweep"))
    assert "0.8750" in console.export_text()


def test_what_does_not_read_costs_no_other_job(sweep: Path) -> None:
    (sweep / "0" / "summary.json").write_text('{"overrides": [')
    (sweep / "1" / "summary.json").write_text(json.dumps({"overrides": 3, "best_val_bpb": "x"}))
    with (sweep / "failures.jsonl").open("ab") as file:
        file.write(b'\xff\n[]\n{"job": "x"}\n{"job": 5}\n' + b"[" * 100_000)
    assert [(row["job"], row["ended"]) for row in collect(sweep)][2:] == [(2, "the loss is nan"), (3, "unfinished")]
    close_sweep(sweep)
    assert (sweep / "sweep.csv").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name", ["x$^$y", "$a_$", "[/bold]x[red]", b"\xff\xfe".decode(errors="surrogateescape"), "日本"]
)
def test_any_name_is_drawn_and_shown_as_it_is(sweep: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep.parent / "named" / name
    shutil.copytree(sweep, folder)
    for job, value in ((0, name), (1, "[local,favor]")):
        overrides = [f"attn={value}", "data.path=a"]
        (folder / str(job) / "summary.json").write_text(json.dumps({**SUMMARY, "overrides": overrides}))
    with lasting_output():
        close_sweep(folder)
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "[local,favor]" in out
    assert name.encode(errors="replace").decode() in out
    assert (folder / "sweep.png").stat().st_size > 1000
    assert "[local,favor]" in (folder / "sweep.csv").read_text()


def test_a_picture_or_a_table_that_fails_leaves_the_others(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("table", "draw"):
        monkeypatch.setattr(f"performer_lm.training.sweep.{name}", lambda *_, **__: 1 / 0)
    close_sweep(sweep)
    assert len(caplog.messages) == 2
    assert (sweep / "sweep.csv").exists()


@pytest.mark.parametrize("name", ["sweep.csv", "sweep.png"])
def test_a_link_under_the_name_of_a_table_is_not_followed(sweep: Path, name: str) -> None:
    (sweep.parent / "theirs").write_text("theirs")
    (sweep / name).symlink_to(sweep.parent / "theirs")
    close_sweep(sweep)
    assert (sweep.parent / "theirs").read_text() == "theirs"
    assert not (sweep / name).is_symlink()
