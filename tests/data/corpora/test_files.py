import bz2
import gzip
import lzma
import re
from pathlib import Path

import pytest

from performer_lm.data.corpora.base import Document
from performer_lm.data.corpora.files import Files


def read(path: Path | str | None, *include: str, **options) -> list[Document]:
    corpus = Files(path=path if path is None else str(path), include=list(include or ["*.txt"]), **options)
    return list(corpus.documents())


def pairs(documents: list[Document]) -> list[tuple[str, bytes]]:
    return [(document.name, document.text) for document in documents]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "b.txt": b"line\r\nnext\0\n",
        "a/deep/c.txt": "\N{SNOWMAN}".encode(),
        "a/code.py": b"pass\n",
        "a/empty.txt": b"",
        ".hidden.txt": b"no",
        ".git/x.txt": b"no",
        "__pycache__/y.txt": b"no",
        "picture.png": b"\x89PNG\xff",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    return tmp_path


def test_a_folder_gives_its_matching_files_sorted_and_byte_exact(folder):
    texts = [("a/deep/c.txt", "\N{SNOWMAN}".encode()), ("a/empty.txt", b""), ("b.txt", b"line\r\nnext\0\n")]
    assert pairs(read(folder)) == texts
    assert all(document.held_out is None for document in read(folder))
    assert [document.name for document in read(folder, "*.py", "b.*")] == ["a/code.py", "b.txt"]
    assert [document.name for document in read(folder, "a/*")] == ["a/code.py", "a/deep/c.txt", "a/empty.txt"]


def test_a_glob_gives_what_it_finds_named_from_where_its_wildcards_begin(folder):
    assert [document.name for document in read(folder / "**" / "*.txt")] == ["a/deep/c.txt", "a/empty.txt", "b.txt"]
    assert [document.name for document in read(folder / "*.txt")] == ["b.txt"]
    assert [document.name for document in read(folder / "a" / "*" / "?.txt")] == ["deep/c.txt"]
    corpus = Files(path=str(folder / "a" / "*" / "?.txt"), include=[])
    assert corpus.place("deep/c.txt") == str(folder / "a" / "deep" / "c.txt")


def test_a_name_with_brackets_that_exists_is_a_name(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert pairs(read(tmp_path / "a[1].txt")) == [("a[1].txt", b"one")]


def test_a_single_file_is_read_whatever_its_name(tmp_path):
    (tmp_path / "notes").write_bytes(b"text")
    assert pairs(read(tmp_path / "notes")) == [("notes", b"text")]


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_packed_files_are_unpacked(tmp_path, suffix, module):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(module.compress(b"packed\r\n"))
    assert pairs(read(path)) == [(f"a.txt{suffix}", b"packed\r\n")]
    path.write_bytes(module.compress(b"packed" * 99)[:-9])
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read")):
        read(path)


def test_validation_documents_may_lie_elsewhere(folder, tmp_path):
    corpus = Files(path=str(folder / "*.txt"), include=["*.txt"], validation_path=str(folder / "a"))
    found = list(corpus.documents())
    assert [(document.name, document.held_out) for document in found] == [
        ("b.txt", None),
        ("validation/deep/c.txt", True),
        ("validation/empty.txt", True),
    ]
    assert corpus.place("validation/deep/c.txt") == str(folder / "a" / "deep" / "c.txt")


def test_places_are_told_without_going_through_the_folder_again(folder, monkeypatch):
    corpus = Files(path=str(folder), include=["*.txt"])
    monkeypatch.setattr("os.scandir", None)
    assert corpus.place("a/deep/c.txt") == str(folder / "a" / "deep" / "c.txt")


def test_each_error_is_one_line_that_names_the_place_and_the_nearest_choice(tmp_path):
    good = tmp_path / "speeches.txt"
    good.write_bytes(b"hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_bytes(b"\0")
    cases = {
        None: "data.path is not given: data=files needs data.path=FILE",
        tmp_path / "speechs.txt": f"speechs.txt does not exist; did you mean {good}?",
        tmp_path / "foldr" / "a" / "b.txt": f"does not exist; did you mean {tmp_path / 'folder'}?",
        good / "deeper.txt": f"does not exist: {good} is a file",
        tmp_path / "folder": "has no text: none of its 1 files match ['*.txt']",
        tmp_path / "speech*.md": f"speech*.md finds no file; the nearest is {good}",
        tmp_path / "foldr" / "*.md": f"finds nothing: {tmp_path / 'foldr'} does not exist; did you mean",
        tmp_path / "folder" / "*.txt": "finds no file; the nearest is",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"data\.validation_path=nowhere does not exist"):
        read(good, validation_path="nowhere")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("secret")

    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: Permission denied"):
        read(tmp_path)
