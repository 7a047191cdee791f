import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.corpus import Document, Files, StandardLibrary, read_text, split_names, split_text

fractions = st.floats(0.001, 0.999)


def read(path: Path | str | None, *include: str) -> list[Document]:
    return list(Files(path=path if path is None else str(path), include=list(include or ["*.txt"])).documents())


def test_the_standard_library_is_sorted_source_without_tests():
    documents: Iterator[Document] = StandardLibrary().documents()
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"json/decoder.py", "os.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "__pycache__"}
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in names)


def test_a_folder_gives_its_matching_files_sorted_and_byte_exact(tmp_path):
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
    assert read(tmp_path) == [("a/deep/c.txt", files["a/deep/c.txt"]), ("b.txt", files["b.txt"])]
    assert [name for name, _ in read(tmp_path, "*.py", "b.*")] == ["a/code.py", "b.txt"]
    assert [name for name, _ in read(tmp_path, "a/*")] == ["a/code.py", "a/deep/c.txt"]


def test_a_single_file_is_read_whatever_its_name(tmp_path):
    (tmp_path / "notes").write_bytes(b"text")
    assert read(tmp_path / "notes") == [("notes", b"text")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc\xef\xbb\xbf")
    assert read_text(tmp_path / "a.txt") == b"abc\xef\xbb\xbf"


def test_each_error_is_one_line_that_names_the_place(tmp_path):
    good, bad, wide, empty = (tmp_path / name for name in ("speeches.txt", "bad.txt", "wide.txt", "empty.txt"))
    good.write_bytes(b"hello")
    bad.write_bytes(b"\xef\xbb\xbfab\xffc")
    wide.write_bytes("hello".encode("utf-16"))
    empty.write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_bytes(b"\0")
    cases = {
        None: "data.path is not given: data=files needs data.path=FILE",
        tmp_path / "speechs.txt": f"speechs.txt does not exist; did you mean {good}?",
        tmp_path / "foldr" / "a" / "b.txt": f"does not exist; did you mean {tmp_path / 'folder'}?",
        good / "deeper.txt": f"does not exist: {good} is a file",
        bad: f"{bad} is not UTF-8 text: byte 0xff at 5",
        wide: f"{wide} is UTF-16 text; convert it to UTF-8",
        empty: f"{empty} has no text: 1 file of 0 bytes",
        tmp_path / "folder": "has no text: none of its 1 files match ['*.txt']",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read(path)
        assert "\n" not in str(caught.value)


@given(sizes=st.dictionaries(st.text(max_size=8), st.integers(1, 1000), min_size=2, max_size=40), fraction=fractions)
def test_a_split_by_name_is_a_partition_with_something_on_each_side(sizes, fraction):
    split = split_names(sizes, fraction=fraction)
    assert split.train
    assert split.validation
    assert sorted([*split.train, *split.validation]) == sorted(sizes)
    assert split.train == [name for name in sizes if name in split.train]


def test_documents_stay_on_their_side_when_others_come():
    few = {f"{index}.txt": 10 for index in range(500)}
    many = {f"{index}.txt": 10 for index in range(1000)}
    small, large = split_names(few, fraction=0.1), split_names(many, fraction=0.1)
    assert set(small.validation) <= set(large.validation)
    assert 60 < len(large.validation) < 140
    assert set(large.validation) <= set(split_names(many, fraction=0.2).validation)


def test_a_document_larger_than_the_held_out_share_is_trained_on():
    sizes = {f"{index}.txt": 10 for index in range(500)}
    chosen = split_names(sizes, fraction=0.1).validation[0]
    assert chosen in split_names({**sizes, chosen: 5000}, fraction=0.1).train


@given(text=st.text(alphabet="ab\nü€\N{GRINNING FACE}", min_size=2, max_size=80).map(str.encode), fraction=fractions)
def test_a_single_document_is_cut_between_lines_or_characters(text, fraction):
    train, validation = split_text(text, fraction=fraction)
    assert train + validation == text
    train.decode()
    validation.decode()


def test_a_single_document_is_cut_at_the_first_line_of_its_share():
    assert split_text(b"one\ntwo\nthree\nfour\n", fraction=0.5) == (b"one\ntwo\nthree\n", b"four\n")
    assert split_text(b"one\ntwo\n", fraction=0.5) == (b"one\n", b"two\n")
    assert split_text(b"no line at all", fraction=0.5) == (b"no line", b" at all")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction):
    with pytest.raises(ValueError, match="validation_fraction"):
        split_names({"a": 1, "b": 1}, fraction=fraction)
    with pytest.raises(ValueError, match="validation_fraction"):
        split_text(b"abc", fraction=fraction)
