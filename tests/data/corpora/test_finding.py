import os
import re
from pathlib import Path

import pytest

from performer_lm.data.corpora.files import Files
from performer_lm.data.corpora.finding import find

TEXTS = ["*.txt", "*.md"]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(path: Path | str, *include: str) -> list[str]:
    return find("data.path", str(path), include or TEXTS).names


def notes(path: Path | str, *include: str) -> list[str]:
    return find("data.path", str(path), include or TEXTS).notes


def test_patterns_match_in_any_case_and_however_files_are_packed(tmp_path):
    found = ["A.TXT", "b.txt.gz", "c.Md.BZ2", "d/e.txt.xz", "f.txt.zst", "g.md.lz4"]
    write(tmp_path, *found, "h.txt.zip", "i.log", "j.gz")
    assert names(tmp_path) == found
    assert names(tmp_path, "*.TXT") == [name for name in found if ".txt" in name.lower()]
    assert names(tmp_path, "*.gz") == ["b.txt.gz", "j.gz"]


def test_what_is_left_out_is_told_once_with_the_commonest_endings(tmp_path, capsys):
    write(tmp_path, "a.txt", *(f"{number}.log" for number in range(7)), *(f"x/{number}.PNG" for number in range(3)))
    assert notes(tmp_path) == [
        f"data.path={tmp_path}: left out 10 files that match no pattern of data.include: 7 x .log, 3 x .png"
    ]
    write(tmp_path, "Makefile", "LICENSE", "b.tar.gz", ".hidden.log", "__pycache__/c.log", ".git/d.log")
    told = "13 files that match no pattern of data.include: 7 x .log, 3 x .png, 2 x no ending, 1 other"
    assert notes(tmp_path) == [f"data.path={tmp_path}: left out {told}"]
    corpus = Files(path=str(tmp_path), include=TEXTS)
    for _ in range(2):
        assert [document.name for document in corpus.documents()] == ["a.txt"]
    assert capsys.readouterr().err == f"data: data.path={tmp_path}: left out {told}\n"
    assert notes(tmp_path, "*") == []
    assert "left out 1 file that matches no" in notes(write(tmp_path / "one", "a.md", "b.bin"))[0]


@pytest.mark.parametrize("pattern", ["", "**", "**/*", "**/*.txt"])
def test_links_are_followed_and_nothing_is_read_twice(tmp_path, pattern):
    inside = write(tmp_path / "inside", "a.txt", "deep/b.txt")
    outside = write(tmp_path / "outside", "c.txt", "more/d.txt")
    (inside / "deep" / "up").symlink_to(inside)
    (inside / "here").symlink_to(".")
    (inside / "0").symlink_to(outside)
    (inside / "1").symlink_to(outside / "more")
    (inside / "0.txt").symlink_to(inside / "a.txt")
    (outside / "back").symlink_to(inside)
    os.link(inside / "deep" / "b.txt", inside / "e.txt")
    found = names(inside / pattern if pattern else inside)
    assert len(found) == 4
    assert {(inside / name).read_text() for name in found} == {"a.txt", "deep/b.txt", "c.txt", "more/d.txt"}
    assert "a.txt" in found  # not by the link's name
    assert notes(inside) == [f"data.path={inside}: left out 2 further names of files that are read already"]


def test_a_link_that_is_added_gives_no_file_another_name(tmp_path):
    write(tmp_path, "b/a.txt", "b/c/d.txt", "z.txt")
    before = names(tmp_path)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "a.txt").symlink_to("z.txt")
    (tmp_path / "b" / "0").symlink_to("c")
    assert names(tmp_path) == names(tmp_path / "**" / "*.txt") == before
    assert names(tmp_path / "a") == ["a.txt", "c/d.txt"]
    assert names(tmp_path / "*" / "0" / "*.txt") == ["b/0/d.txt"]


def test_a_link_may_lead_to_what_is_hidden_or_elsewhere(tmp_path):
    write(tmp_path, "home/a.txt", "home/.git/b.txt", "store/c.txt")
    (tmp_path / "home" / "git").symlink_to(".git")
    (tmp_path / "home" / "d.txt").symlink_to("../store/c.txt")
    assert names(tmp_path / "home") == ["a.txt", "d.txt", "git/b.txt"]


def test_a_wanted_link_that_leads_nowhere_is_refused_and_another_is_left_out(tmp_path):
    write(tmp_path, "a.txt")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone.log").symlink_to("nowhere")
    assert names(tmp_path) == ["a.txt"]
    for target in ("b.txt", "nowhere"):
        (tmp_path / "b.txt").symlink_to(target)
        for path in (tmp_path, tmp_path / "*.txt"):
            with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/b.txt cannot be read: the link leads nowhere")):
                names(path)
        (tmp_path / "b.txt").unlink()


def test_a_glob_is_read_as_a_shell_reads_it(tmp_path):
    write(tmp_path, "a.txt", "b/c.txt", "b/d/e.txt", ".f/g.txt", ".h.txt", "b/__pycache__/i.txt", "b/j.TXT")
    for pattern, found in {
        "*.txt": ["a.txt"],
        "*/*.txt": ["b/c.txt"],
        "**/*.txt": ["a.txt", "b/c.txt", "b/d/e.txt"],
        "b/**": ["c.txt", "d/e.txt", "j.TXT"],
        "**/d/**/*": ["b/d/e.txt"],
        "*/d/../?.txt": ["b/d/../c.txt"],
        "*/d/e.txt": ["b/d/e.txt"],
        "**/[ce].*": ["b/c.txt", "b/d/e.txt"],
        ".*/*": [".f/g.txt"],
        ".*": [".h.txt"],
    }.items():
        assert names(tmp_path / pattern) == found, pattern
    assert names(f"{tmp_path}/b/**") == names(f"{tmp_path}/b/**/*")


def test_folders_may_lie_as_deep_as_paths_reach(tmp_path):
    folders = [tmp_path]
    for _ in range(1100):
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    (folders[-1] / "a.txt").write_text("deep")
    assert names(tmp_path) == ["d/" * 1100 + "a.txt"]
    (folders[-1] / "a.txt").unlink()
    for folder in reversed(folders[1:]):  # pytest would take them away by recursion
        folder.rmdir()


def test_pipes_devices_and_sockets_are_left_out_of_folders_and_refused_by_name(tmp_path):
    write(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    told = "left out 2 that are no regular files (pipes, devices, sockets): pipe.txt, zero.txt"
    for path in (tmp_path, tmp_path / "*.txt"):
        assert names(path) == ["a.txt"]
        assert notes(path) == [f"data.path={path}: {told}"]
    for path, kind in {"pipe.txt": "a named pipe", "zero.txt": "a device"}.items():
        with pytest.raises(ValueError, match=re.escape(f"{path} is {kind}; only regular files are read")):
            names(tmp_path / path)
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        names("/dev/zero")


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt"])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, pattern):
    write(tmp_path, "a.txt", "b/c.txt", "locked/d.txt")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    path = tmp_path / pattern if pattern else tmp_path
    with pytest.raises(ValueError, match=re.escape(f"={path}: {tmp_path}/locked cannot be read: Permission denied")):
        names(path)
