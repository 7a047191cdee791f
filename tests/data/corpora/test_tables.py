import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from performer_lm.data.corpora.files import Files
from performer_lm.data.corpora.tables import import_datasets, is_table, read_column

TEXTS = ["first é", "second\r\nline", "NA", "", "nul \0", "5"]


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path)
        case ".csv" | ".tsv":
            comma = "," if path.suffix == ".csv" else "\t"
            lines = [f'{row["id"]}{comma}"{row["text"]}"' for row in rows]
            path.write_bytes("".join(f"{line}\n" for line in [f"id{comma}text", *lines]).encode())
        case _:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.csv", "a.tsv"])
def test_each_row_is_a_text_byte_for_byte(tmp_path, name):
    texts = TEXTS[:4] if name.endswith("sv") else TEXTS
    path = write(tmp_path / name, texts)
    assert list(read_column(path, column="text")) == [(row, text.encode()) for row, text in enumerate(texts)]


def test_rows_go_on_over_all_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("performer_lm.data.corpora.tables.ROWS_AT_ONCE", 7)
    texts = [f"row {number}" for number in range(40)]
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        assert [text.decode() for _, text in read_column(write(tmp_path / name, texts), column="text")] == texts


def test_missing_values_are_empty_and_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"id": 3}\n')
    assert list(read_column(tmp_path / "a.jsonl", column=None)) == [(0, b"x"), (1, b""), (2, b"")]
    for name, content in {"b.jsonl": "", "b.csv": "", "c.csv": "text,id\n"}.items():
        (tmp_path / name).write_text(content)
        assert list(read_column(tmp_path / name, column="text")) == []


def test_which_files_are_tables():
    always, asked, never = (
        ("a.jsonl", "a.parquet", "a.jsonl.gz"),
        ("a.csv", "a.tsv", "a.json"),
        ("a.txt", "a.gz", "jsonl"),
    )
    for column in (None, "text"):
        assert all(is_table(name, column=column) for name in always)
        assert all(is_table(name, column=column) == (column is not None) for name in asked)
        assert not any(is_table(name, column=column) for name in never)


def test_files_reads_tables_and_texts_side_by_side(tmp_path):
    write(tmp_path / "a.jsonl", ["one", "two"])
    write(tmp_path / "b.csv", ["three"])
    (tmp_path / "c.txt").write_text("four")
    include = ["*.txt", "*.jsonl", "*.csv"]
    plain = list(Files(path=str(tmp_path), include=include).documents())
    assert [document.name for document in plain] == ["a.jsonl#0", "a.jsonl#1", "b.csv", "c.txt"]
    named = Files(path=str(tmp_path), include=include, text_column="text")
    assert [(document.name, document.text) for document in named.documents()] == [
        ("a.jsonl#0", b"one"),
        ("a.jsonl#1", b"two"),
        ("b.csv#0", b"three"),
        ("c.txt", b"four"),
    ]
    assert named.place("a.jsonl#1") == f"{tmp_path}/a.jsonl#1"


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.jsonl", '{"txt": "x", "id": 1}', "text", "{} has no column 'text'; did you mean data.text_column=txt?"),
        ("a.jsonl", '{"id": 1, "n": 2}', "text", "{} has no column 'text' (columns: id, n)"),
        ("a.csv", "body,id\nx,1\n", "bodi", "{} has no column 'bodi'; did you mean data.text_column=body?"),
        ("a.jsonl", '{"text": 1}', "text", "{}: column 'text' holds int64, not text"),
        ("a.jsonl", '{"text": ["a"]}', "text", "{}: column 'text' holds list"),
        ("a.jsonl", '{"text": "x"}\n{"text": oops\n', "text", "{} cannot be read: JSON parse error"),
        ("a.jsonl", '{"text": "\\ud800"}', "text", "{} cannot be read: JSON parse error: The surrogate pair"),
        ("a.parquet", "no parquet", "text", "{} cannot be read: Parquet magic bytes not found"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, capfd, name, content, column, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message.format(tmp_path / name))) as caught:
        list(read_column(tmp_path / name, column=column))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_column_of_parquet_is_found_before_anything_is_read(tmp_path):
    path = write(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=re.escape(f"{path} has no column 'txt'; did you mean data.text_column=text?")):
        list(read_column(path, column="txt"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"tables and hub data need the package 'datasets': pip install datasets"):
        import_datasets()
