import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from performer_lm.cli.sweeps import FAILURES, FOLDER, Sweep, note_failure, sweep_folder, sweeping


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)


@pytest.mark.parametrize("fails", [False, True])
def test_the_folder_is_handed_down_and_closed_however_the_jobs_end(tmp_path: Path, fails: bool) -> None:
    closed: list[Path] = []
    expected = pytest.raises(RuntimeError, match="launcher") if fails else nullcontext()
    with expected, sweeping(Sweep(folder_key="run_dir", close=closed.append), tmp_path):
        assert sweep_folder() == str(tmp_path)
        (tmp_path / "0").mkdir()
        if fails:
            raise RuntimeError("launcher")
    assert sweep_folder() is None
    assert closed == [tmp_path]


def test_nothing_is_closed_where_no_job_left_anything(tmp_path: Path) -> None:
    closed: list[Path] = []
    with sweeping(Sweep(folder_key="run_dir", close=closed.append), tmp_path / "never made"):
        pass
    with sweeping(Sweep(folder_key="run_dir", close=closed.append), tmp_path):
        pass
    assert closed == []


def test_a_sweep_inside_a_job_of_another_gives_its_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "outer")
    with sweeping(Sweep(folder_key="run_dir", close=lambda folder: None), tmp_path):
        assert sweep_folder() == str(tmp_path)
    assert sweep_folder() == "outer"


def test_a_single_run_has_no_folder_and_notes_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep_folder() is None
    note_failure(0, ["a=1"], code=1, error="x")
    assert list(tmp_path.iterdir()) == []


def test_failures_are_kept_line_by_line(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    with sweeping(Sweep(folder_key="run_dir", close=lambda folder: None), folder):
        note_failure(3, ["attn=flash", "data.path=a b"], code=4, error="out of memory")
        note_failure(5, [], code=3, error="the loss is nan")
    lines = [json.loads(line) for line in (folder / FAILURES).read_text().splitlines()]
    assert lines[0] == {"job": 3, "overrides": ["attn=flash", "data.path=a b"], "code": 4, "error": "out of memory"}
    assert [line["job"] for line in lines] == [3, 5]
