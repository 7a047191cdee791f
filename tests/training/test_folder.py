import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from performer_lm.training.folder import RunFolder
from performer_lm.training.run import Run

Start = Callable[..., Run]
TOP = ["config.yaml", "train.log", "metrics.jsonl", "metrics.csv", "metrics.png", "samples.txt", "summary.json"]
TOP += ["run.lock", "wandb_id"]
BELOW = ["checkpoints/step=000004.ckpt", "checkpoints/step=000004.ckpt.sha256", "checkpoints/last.ckpt"]
BELOW += ["checkpoints/step=000004.ckpt.1.tmp", "nonfinite/step=000001.json", "nonfinite/step=000001-rank0.pt"]
BELOW += ["tensorboard/hparams.yaml", "tensorboard/deep/er/events", "wandb/debug.log", "wandb/run-1/files/config.yaml"]
FOLDERS = ["checkpoints", "nonfinite", "tensorboard", "wandb"]


def test_a_name_in_use_gets_a_suffix(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path / "day" / "a", writes=True).path.name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]


def test_a_name_taken_this_very_moment_gets_a_suffix_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(Path, "exists", lambda path: path == tmp_path)
    assert RunFolder.create(tmp_path / "a", writes=True).path == tmp_path / "a-2"


def test_what_was_made_for_nothing_is_taken_away(tmp_path: Path) -> None:
    for make in (RunFolder.create, RunFolder.take):
        make(tmp_path / "runs" / "day" / "a", writes=True).release()
        assert list(tmp_path.iterdir()) == []
        room = make(tmp_path / "runs" / "day" / "a", writes=True)
        (room.path / "train.log").touch()
        room.release()
        assert [path.name for path in room.path.iterdir()] == ["train.log"]
        shutil.rmtree(tmp_path / "runs")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    for make in (RunFolder.create, RunFolder.take):
        make(tmp_path / "runs" / "a", writes=False).release()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_was_named_is_taken_whatever_lies_there_but_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "a" / "probe").write_text("mine too")
    (tmp_path / "a" / "link").symlink_to("/")
    (tmp_path / "a" / "config.yaml.123.tmp").write_text("of a killed write")
    (tmp_path / "a" / "my.tmp").write_text("mine three")
    for _ in range(2):
        room = RunFolder.take(tmp_path / "a", writes=True)
        assert room.path == tmp_path / "a"
        room.release()
    assert {path.name for path in room.path.iterdir()} - {"checkpoints"} == {"notes.txt", "probe", "link", "my.tmp"}
    with pytest.raises(FileExistsError, match="notes"):
        RunFolder.take(tmp_path / "a" / "notes.txt", writes=True)


# --- folders made to harm ---------------------------------------------------------------------------------------------


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def relative_link(path: Path, outside: Path) -> None:
    path.symlink_to(os.path.relpath(outside, path.parent))


def dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside.with_name("new"))


def link_through_another(path: Path, outside: Path) -> None:
    path.with_name("step=000009.ckpt").symlink_to(outside)
    path.symlink_to("step=000009.ckpt")


def hard_link(path: Path, outside: Path) -> None:
    path.hardlink_to(outside)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".bashrc").write_text("theirs")
    return tmp_path / "home" / ".bashrc"


def untouched(outside: Path) -> bool:
    return outside.read_text() == "theirs" and [path.name for path in outside.parent.iterdir()] == [".bashrc"]


KINDS = [link, relative_link, dangling_link, link_through_another, hard_link, pipe]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", [*TOP, *BELOW])
def test_a_folder_in_which_a_file_leads_out_is_refused(
    name: str, kind: Callable[[Path, Path], None], tmp_path: Path, outside: Path
) -> None:
    path = tmp_path / "runs" / "a" / name
    path.parent.mkdir(parents=True)
    kind(path, outside)
    with pytest.raises(OSError, match=r"(link|pipe)") as told:
        RunFolder(tmp_path / "runs" / "a", writes=True)
    assert str(told.value.filename).startswith(str(path.parent))
    assert len(str(told.value).splitlines()) == 1
    assert untouched(outside)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_which_a_folder_leads_out_is_refused(name: str, tmp_path: Path, outside: Path) -> None:
    (tmp_path / "a").mkdir()
    for target in (outside.parent, outside.with_name("new"), outside):
        (tmp_path / "a" / name).symlink_to(target)
        with pytest.raises(OSError, match=rf"is no folder of its own.*{name}"):
            RunFolder(tmp_path / "a", writes=True)
        (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / name).touch()
    with pytest.raises(OSError, match=rf"is no folder of its own.*{name}"):
        RunFolder(tmp_path / "a", writes=True)
    assert untouched(outside)


def test_links_that_a_run_itself_makes_stay(tmp_path: Path) -> None:
    for folder in ("checkpoints", "wandb/run-1/logs"):
        (tmp_path / "a" / folder).mkdir(parents=True)
    (tmp_path / "a/checkpoints/step=000004.ckpt").touch()
    for name in ("best", "last"):
        (tmp_path / f"a/checkpoints/{name}.ckpt").symlink_to("step=000004.ckpt")
    (tmp_path / "a/wandb/latest-run").symlink_to("run-1")
    (tmp_path / "a/wandb/debug.log").symlink_to("run-1/logs/debug.log")
    (tmp_path / "newest").symlink_to("a")
    for name in ("a", "newest"):
        RunFolder(tmp_path / name, writes=True).release()


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl", "config.yaml", "checkpoints"])
def test_resuming_in_a_folder_made_to_harm_is_one_line(start: Start, name: str, outside: Path) -> None:
    start("run_dir=runs/a").fit()
    if name == "checkpoints":
        shutil.move("runs/a/checkpoints", outside.parent.parent / "theirs")
        Path("runs/a/checkpoints").symlink_to(outside.parent.parent / "theirs")
    else:
        Path("runs/a", name).unlink(missing_ok=True)
        Path("runs/a", name).symlink_to(outside)
    for ckpt in (["ckpt=runs/a"], ["ckpt=auto", "run_dir=runs/a"]):
        with pytest.raises(ValueError, match=r"link|leads out|no folder of its own") as told:
            start("trainer.max_steps=6", *ckpt)
        assert "\n" not in str(told.value)
    assert untouched(outside)


def test_a_runs_own_link_to_another_run_is_not_followed(start: Start) -> None:
    start("run_dir=runs/mine").fit()
    Path("runs/theirs/checkpoints").mkdir(parents=True)
    Path("runs/theirs/checkpoints/last.ckpt").symlink_to(Path("runs/mine/checkpoints/last.ckpt").resolve())
    before = Path("runs/mine/train.log").read_bytes()
    for ckpt in (["ckpt=runs/theirs"], ["ckpt=auto", "run_dir=runs/theirs"]):
        with pytest.raises(ValueError, match=r"runs/theirs"):
            start("trainer.max_steps=6", *ckpt)
    assert Path("runs/mine/train.log").read_bytes() == before


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["runs/a", "runs/a/checkpoints"])
def test_a_folder_that_takes_no_file_is_found_before_training_and_nothing_is_left(
    start: Start, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_CREAT and Path(path).parent == Path(where):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, *more, **options)

    def refuse_too(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if mode[0] in "xwa" and path.parent == Path(where):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "open", refuse_too)
    with pytest.raises(ValueError, match=rf"^{where}(/run.lock)?: cannot be written \(permission denied\)$"):
        start("run_dir=runs/a")
    assert not Path("runs").exists()


def test_a_full_disk_is_found_before_training_and_nothing_is_left(start: Start) -> None:
    start("run_dir=runs/a").fit()
    before = set(Path("runs").rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for words in (["run_dir=runs/b"], ["ckpt=auto", "run_dir=runs/b"], ["ckpt=runs/a", "trainer.max_steps=6"]):
            with pytest.raises(ValueError, match=r"runs/[ab]: cannot be written \(file too large\)"):
                start(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(Path("runs").rglob("*")) == before


def test_a_config_that_cannot_be_written_leaves_no_folder(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("run_dir=runs/a")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "runs/a/config.yaml")

    monkeypatch.setattr("performer_lm.training.folder.replace_text", fail)
    with pytest.raises(OSError, match="No space left"):
        run.fit()
    assert not Path("runs").exists()
