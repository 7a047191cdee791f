import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from performer_lm.writing import append_text, check_plain, open_plain, read_start, replace_text, replacing


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside.with_name("new"))


def link_to_itself(path: Path, outside: Path) -> None:
    path.symlink_to(path.name)


def hard_link(path: Path, outside: Path) -> None:
    path.hardlink_to(outside)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, outside: Path) -> None:
    path.mkdir()


KINDS = [link, dangling_link, link_to_itself, hard_link, pipe, folder]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("theirs")
    return tmp_path / "elsewhere" / "file"


def untouched(outside: Path) -> bool:
    return outside.read_text() == "theirs" and [path.name for path in outside.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_nothing_is_added_to_what_is_no_plain_file(
    kind: Callable[[Path, Path], None], tmp_path: Path, outside: Path
) -> None:
    kind(tmp_path / "a", outside)
    for use in (check_plain, lambda path: append_text(path, "ours"), lambda path: open_plain(path, os.O_RDWR)):
        with pytest.raises(OSError, match=r"(link|folder|pipe)") as told:
            use(tmp_path / "a")
        assert told.value.filename == str(tmp_path / "a")
        assert len(str(told.value).splitlines()) == 1
    assert untouched(outside)


@pytest.mark.parametrize("kind", KINDS[:-1], ids=lambda kind: kind.__name__)
def test_a_new_file_takes_the_place_of_a_link_and_leaves_what_that_names(
    kind: Callable[[Path, Path], None], tmp_path: Path, outside: Path
) -> None:
    kind(tmp_path / "a", outside)
    kind(tmp_path / f"a.{os.getpid()}.tmp", outside)  # the name that it is written under
    replace_text(tmp_path / "a", "ours")
    assert (tmp_path / "a").read_text() == "ours"
    assert not (tmp_path / "a").is_symlink()
    assert untouched(outside)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "elsewhere"}


def test_plain_files_grow_and_any_text_can_be_written(tmp_path: Path) -> None:
    for text in ("one\n", "two \udcff\r\n", "three ü\n"):
        append_text(tmp_path / "a", text)
    assert (tmp_path / "a").read_bytes() == "one\ntwo \\udcff\r\nthree ü\n".encode()
    replace_text(tmp_path / "a", "\udcff")
    assert (tmp_path / "a").read_text() == "\\udcff"
    check_plain(tmp_path / "a")
    check_plain(tmp_path / "none")


def test_a_write_that_fails_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    replace_text(tmp_path / "a", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        for write in (replace_text, append_text):
            with pytest.raises(OSError, match="cannot be written") as told:
                write(tmp_path / "a", "new" * 100)
            assert told.value.filename == str(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a").read_text().startswith("old")
    with suppress(RuntimeError), replacing(tmp_path / "a") as file:
        file.write(b"half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_reading_waits_for_nothing_and_takes_no_more_than_it_is_asked_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_start(tmp_path / "pipe", 10) == b""
    assert read_start(Path("/dev/zero"), 10) == bytes(10)
    (tmp_path / "file").write_bytes(b"0123456789abc")
    assert read_start(tmp_path / "file", 10) == b"0123456789"
    with pytest.raises(OSError, match="directory"):
        read_start(tmp_path, 10)
