from pathlib import Path

import pytest

from performer_lm.training.folder import RunFolder


def test_a_name_in_use_gets_a_suffix(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path / "day" / "a", writes=True).path.name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]


def test_a_name_taken_this_very_moment_gets_a_suffix_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(Path, "exists", lambda path: path == tmp_path)
    assert RunFolder.create(tmp_path / "a", writes=True).path == tmp_path / "a-2"


def test_what_was_made_for_nothing_is_taken_away(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "runs" / "day" / "a", writes=True).abandon()
    assert list(tmp_path.iterdir()) == []
    room = RunFolder.create(tmp_path / "runs" / "day" / "a", writes=True)
    (room.path / "train.log").touch()
    room.abandon()
    assert [path.name for path in room.path.iterdir()] == ["train.log"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    room = RunFolder.create(tmp_path / "runs" / "a", writes=False)
    room.abandon()
    assert list(tmp_path.iterdir()) == []
