"""Nothing that can be gone on with is started over in silence, and nothing that lies about stops a run."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.training.run import Run

Start = Callable[..., Run]
ONE = ["trainer.val_every=4"]  # one checkpoint


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(start: Start, kept: Path) -> Callable[..., Path]:
    """Return a function that trains `runs/a` with overrides, once, and returns where its last checkpoint lies."""

    def make(*overrides: str) -> Path:
        folder = kept / " ".join(("run", *overrides))
        if folder.exists():
            shutil.copytree(folder, "runs/a", symlinks=True)
        else:
            start(*overrides, "run_dir=runs/a").fit()
            shutil.copytree("runs/a", folder, symlinks=True)
        return Path("runs/a/checkpoints/last.ckpt").resolve()

    return make


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_without_checksum(path: Path) -> None:
    checkpoint.sidecar_of(path).unlink()
    flip(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def make_the_checksum_a_pipe(path: Path) -> None:
    checkpoint.sidecar_of(path).unlink()
    os.mkfifo(checkpoint.sidecar_of(path))


def make_the_checksum_a_device(path: Path) -> None:
    checkpoint.sidecar_of(path).unlink()
    checkpoint.sidecar_of(path).symlink_to("/dev/zero")


DAMAGES = [cut, flip, flip_without_checksum, empty, remove, make_a_folder, make_a_loop]
FOREIGN = [make_a_pipe, make_the_checksum_a_pipe, make_the_checksum_a_device]


@pytest.mark.parametrize("named", [["run_dir=runs/a"], []], ids=["a named folder", "any folder"])
@pytest.mark.parametrize("damage", [*DAMAGES, *FOREIGN], ids=lambda damage: damage.__name__)
def test_a_run_whose_only_checkpoint_is_damaged_is_not_started_over(
    start: Start, trained: Callable[..., Path], damage: Callable[[Path], None], named: list[str]
) -> None:
    last = trained(*ONE)
    damage(last)
    before = set(Path("runs").rglob("*"))
    with pytest.raises(ValueError, match=r"no checkpoint of runs/a is whole.*start over.*run_dir=") as told:
        start(*ONE, "ckpt=auto", *named)
    assert last.name in str(told.value)
    assert "\n" not in str(told.value)
    assert set(Path("runs").rglob("*")) == before


@pytest.mark.parametrize(
    "damage", [each for each in DAMAGES if "pipe" not in str(each)][:-1], ids=lambda damage: damage.__name__
)
def test_of_two_checkpoints_the_whole_one_is_gone_on_with_and_both_are_told(
    start: Start, trained: Callable[..., Path], damage: Callable[[Path], None]
) -> None:
    last = trained()
    damage(last)
    for named in ([], ["run_dir=runs/a"]):
        run = start("ckpt=auto", *named)
        assert run.resumed is not None
        assert run.resumed.content["global_step"] == 2
        assert any(last.name in note and "step=000002" in note for note in run.notes)
        run.run_folder.release()
    with pytest.raises(ValueError, match=r"a/.*(4|last).*ckpt.*to go on from the one before it: ckpt=.*step=000002"):
        start("ckpt=runs/a")


def test_an_older_run_is_not_gone_on_with_in_the_place_of_a_damaged_one(
    start: Start, trained: Callable[..., Path]
) -> None:
    trained(*ONE)
    shutil.copytree("runs/a", "runs/older", symlinks=True)
    os.utime("runs/older/checkpoints", (1, 1))
    cut(Path("runs/a/checkpoints/last.ckpt").resolve())
    with pytest.raises(ValueError, match="no checkpoint of runs/a is whole"):
        start(*ONE, "ckpt=auto")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 100)


def a_huge_hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def deep_lists(path: Path) -> None:
    nested: object = []
    for _ in range(150):
        nested = [nested]
    torch.save({"state_dict": {}, "performer_lm": {"format": 1, "model": nested}}, path)


def odd_sections(path: Path) -> None:
    section = {"format": 1, "model": [], "fingerprint": 3, "training": [1], "seed": 0}
    torch.save({"state_dict": {}, "performer_lm": section, "global_step": "x"}, path)


HOSTILE = [garbage, a_huge_hole, a_device, deep_lists, odd_sections, empty, os.mkfifo, Path.mkdir]


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("place", ["runs/stranger/checkpoints/last.ckpt", "runs/x/y/checkpoints/step=000001.ckpt"])
def test_what_lies_about_in_runs_neither_stops_nor_starts_a_run(
    start: Start, trained: Callable[..., Path], make: Callable[[Path], None], place: str
) -> None:
    Path(place).parent.mkdir(parents=True)
    os.mkfifo(Path(place).parent.parent / "config.yaml")
    make(Path(place))
    assert start("ckpt=auto").resumed is None
    trained()
    os.utime(Path(place).parent)
    run = start("ckpt=auto")
    assert run.folder == Path("runs/a").resolve()


def test_a_folder_nested_without_end_stops_no_run(
    start: Start, trained: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    trained()
    Path("runs/d").mkdir()
    for _ in range(1500):  # from the inside out, for a path of them all would be too long to name
        Path("runs/e").mkdir()
        Path("runs/d").rename("runs/e/d")
        Path("runs/e").rename("runs/d")
    request.addfinalizer(lambda: subprocess.run(["rm", "-r", "runs/d"], check=True))
    assert start("ckpt=auto").folder == Path("runs/a").resolve()
    with pytest.raises(ValueError, match="does not exist; nearest"):
        start("ckpt=runs/b")


@pytest.mark.parametrize("left", [[], ["run.lock"], ["train.log", "run.lock"], ["notes.txt"]], ids=str)
def test_auto_takes_the_folder_that_is_named_every_time(start: Start, left: list[str]) -> None:
    Path("runs/a").mkdir(parents=True)
    for name in left:
        Path("runs/a", name).touch()
    run = start("ckpt=auto", "run_dir=runs/a")
    assert run.folder == Path("runs/a")
    run.fit()
    again = start("ckpt=auto", "run_dir=runs/a", "trainer.max_steps=6")
    assert again.folder == Path("runs/a").resolve()
    assert [path.name for path in Path("runs").iterdir() if not path.is_symlink()] == ["a"]


def test_a_run_that_was_left_before_its_first_save_starts_again_in_its_folder_and_says_so(start: Start) -> None:
    run = start("ckpt=auto", "run_dir=runs/a")
    run.run_folder.open(run.cfg)
    run.run_folder.release()
    again = start("ckpt=auto", "run_dir=runs/a")
    assert again.folder == Path("runs/a")
    assert again.notes == ["runs/a holds no checkpoint yet: it starts from the beginning"]


def test_a_last_checkpoint_that_is_gone_is_not_passed_over_for_the_best(
    start: Start, trained: Callable[..., Path]
) -> None:
    trained().unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read: No such file.*step=000002"):
        start("ckpt=runs/a")
    Path("pipe.ckpt").unlink(missing_ok=True)
    os.mkfifo("pipe.ckpt")
    with pytest.raises(ValueError, match=r"ckpt=pipe\.ckpt is no file"):
        start("ckpt=pipe.ckpt")
    with pytest.raises(ValueError, match=r"ckpt=runs is a folder that holds no checkpoint"):
        start("ckpt=runs")
