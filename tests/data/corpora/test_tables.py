import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from performer_lm.data.corpora.collection import Collection
from performer_lm.data.corpora.files import Files
from performer_lm.data.corpora.tables import is_table, read_column

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
        ("a.jsonl", '{"id": 1, "n": 2}\n{"m": 3}', "text", "{} has no column 'text' (columns: id, n, m)"),
        ("a.jsonl", '{"meta": {"text": "x"}}', "meta.txt", "did you mean data.text_column=meta.text?"),
        ("a.jsonl", '{"text": 1}', "text", "{} line 1: column 'text' holds a number, not text"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ["a"]}', "text", "{} line 3: column 'text' holds a list"),
        ("a.jsonl", '{"text": {}}', "text", "{} line 1: column 'text' holds an object"),
        ("a.jsonl", '{"text": true}', "text", "{} line 1: column 'text' holds true or false"),
        ("a.jsonl", '{"text": "a"}\n["a"]', "text", "{} line 2 is no JSON object"),
        ("a.jsonl", '{"text": "x"}\n{"text": oops\n', "text", "{} line 2 is not JSON: Expecting value at column 10"),
        ("a.jsonl", '{"text": "x"}\n{"text": "cut', "text", "{} line 2 is not JSON: Unterminated string"),
        ("a.jsonl", '{"text": "x"} {"text": "y"}', "text", "{} line 1 is not JSON: more than one value, at column 14"),
        ("a.jsonl", "[" * 100_000, "text", "{} line 1 is nested too deeply"),
        ("a.jsonl", "[\n" * 100_000, "text", "{} line 1 is nested too deeply"),
        ("a.json", '[{"text": "x"},\n{"text": y}]', "text", "{} line 2 is not JSON: Expecting value at column 10"),
        ("a.json", '[{"text": "x"}, {"text": 5}]', "text", "{} row 1: column 'text' holds a number"),
        ("a.csv", "body,id\nx,1\n", "bodi", "{} has no column 'bodi'; did you mean data.text_column=body?"),
        (
            "a.csv",
            "id,text\n1,a\n2,b,c\n",
            "text",
            "{} cannot be read: Error tokenizing data. C error: Expected 2 fields in",
        ),
        ("a.csv", "text,id\na,1,\nb,2,\n", "text", "{} has rows of more fields than its header names"),
        (
            "a.csv",
            'id,text\n1,"a\n2,b\n',
            "text",
            "{} cannot be read: Error tokenizing data. C error: EOF inside string",
        ),
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


def texts(path: Path, content: str | bytes, column: str | None = None) -> list[bytes]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [text for _, text in read_column(path, column=column)]


OTHERS = ["1", '"one"', "null", '{"a": {"b": 2}}', '{"a": [3]}', "[1, [2]]", "1.5e999", "9" * 5000, "true"]


def test_only_the_wanted_column_of_jsonl_matters(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", None)
    rows = [f'{{"other": {other}, "text": "row {number}"}}' for number, other in enumerate(OTHERS)]
    assert texts(tmp_path / "a.jsonl", "\n".join(rows)) == [f"row {number}".encode() for number in range(len(OTHERS))]
    late = ['{"id": 1}'] * 5000 + ['{"text": null}', '{"text": "late"}']
    assert texts(tmp_path / "b.jsonl", "\n".join(late)) == [b""] * 5001 + [b"late"]
    spaced = '\r\n{"text": "a"}\r\n   \n\n\t{"text": "b\t\x1e"}  \n'
    assert texts(tmp_path / "c.jsonl", spaced) == [b"a", b"b\t\x1e"]
    assert texts(tmp_path / "d.jsonl", b'\xef\xbb\xbf{"text": "\xef\xbb\xbfa"}') == ["\N{BYTE ORDER MARK}a".encode()]
    assert texts(tmp_path / "e.jsonl", '{"text": "\\ud83d\\ude00\\u0000\u2028"}') == [
        "\N{GRINNING FACE}\0\u2028".encode()
    ]


def test_large_jsonl_is_read_as_it_comes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "row"}\n' * 100_000 + "oops")
    rows = read_column(tmp_path / "a.jsonl", column=None)
    assert [next(rows) for _ in range(3)] == [(0, b"row"), (1, b"row"), (2, b"row")]
    with pytest.raises(ValueError, match="line 100001 is not JSON"):
        list(rows)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_may_go_over_several_lines(tmp_path, name):
    rows = [{"text": "a"}, {"id": [1]}, {"text": "b\n"}]
    for content in (json.dumps(rows), json.dumps(rows, indent=1), "\n".join(json.dumps(row, indent=1) for row in rows)):
        assert texts(tmp_path / name, f"\n{content}\n", "text") == [b"a", b"", b"b\n"]
    assert texts(tmp_path / name, "[]", "text") == []


def test_a_text_may_lie_inside_a_column(tmp_path):
    rows = '{"meta": {"text": "a", "n": 1}}\n{"meta": null}\n{"meta": {"n": 2}}\n{"meta": "b"}\n{"meta.text": "c"}\n{}'
    assert texts(tmp_path / "a.jsonl", rows, "meta.text") == [b"a", b"", b"", b"", b"c", b""]
    meta = [{"text": {"en": "a", "de": None}}, {"text": None}, None]
    pq.write_table(pa.table({"meta": meta, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert [text for _, text in read_column(tmp_path / "a.parquet", column="meta.text.en")] == [b"a", b"", b""]
    for column, message in {
        "meta.txt": "has no column 'meta.txt'; did you mean data.text_column=meta.text?",
        "mat.text": "has no column 'mat'; did you mean data.text_column=meta?",
        "n.text": "has no column 'n.text'",
        "meta": "column 'meta' holds struct<",
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/a.parquet")) as caught:
            list(read_column(tmp_path / "a.parquet", column=column))
        assert message in str(caught.value)
    pq.write_table(pa.table({"meta.text": ["dotted"], "meta": [{"text": "field"}]}), tmp_path / "b.parquet")
    assert [text for _, text in read_column(tmp_path / "b.parquet", column="meta.text")] == [b"dotted"]


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary", "null"]
)
def test_every_kind_of_text_in_parquet_is_read(tmp_path, kind):
    made = {"dictionary": pa.dictionary(pa.int32(), pa.string())}.get(kind) or pa.type_for_alias(kind)
    column = pa.nulls(3) if kind == "null" else pa.array(["a", "\N{SNOWMAN}", None]).cast(made)
    pq.write_table(pa.table({"text": column, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    wanted = [b"", b"", b""] if kind == "null" else [b"a", "\N{SNOWMAN}".encode(), b""]
    assert [text for _, text in read_column(tmp_path / "a.parquet", column=None)] == wanted


def test_the_header_of_csv_may_be_any_text(tmp_path):
    assert texts(tmp_path / "a.csv", '\ufeffGr\xf6\xdfe,id\nNULL,\n,2\n\n"a,b",3\n', "Gr\xf6\xdfe") == [
        b"NULL",
        b"",
        b"a,b",
    ]
    with pytest.raises(ValueError, match=re.escape("did you mean data.text_column=Gr\xf6\xdfe")):
        list(read_column(tmp_path / "a.csv", column="Gr\xf6sse"))
    assert texts(tmp_path / "a.tsv", 'text\tid\n"a\tb"\t1\nc, d\t2', "text") == [b"a\tb", b"c, d"]


BROKEN = b"caf\xe9 \xff."
ROWS = {
    "a.jsonl": b'{"text": "caf\xe9 \xff."}\n{"text": "fine"}\n',
    "a.csv": b"id,text\n1,caf\xe9 \xff.\n2,fine\n",
    "a.parquet": b"",
}


@pytest.mark.parametrize("name", ROWS)
def test_the_policy_for_what_is_not_utf8_reaches_tables(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([BROKEN, b"fine"])}), path)
    else:
        path.write_bytes(ROWS[name])

    def read(errors: str) -> list[bytes]:
        collection = Collection({"": Files(path=str(path), include=[], text_column="text")}, errors=errors)
        return [part.document.text for part in collection.documents()]

    assert read("replace") == ["caf\ufffd \ufffd.".encode(), b"fine"]
    assert read("skip") == [b"fine"]
    assert read("bytes") == [BROKEN, b"fine"]
    with pytest.raises(ValueError, match=re.escape(f"{path}#0 is not UTF-8 text: byte 0xe9 at 3; data.errors=replace")):
        read("strict")


def test_half_a_character_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    found = [text for _, text in read_column(tmp_path / "a.jsonl", column=None)]
    assert found == ["a\ud800b".encode("utf-8", "surrogatepass")]
    corpus = Files(path=str(tmp_path / "a.jsonl"), include=[])
    with pytest.raises(ValueError, match=re.escape("a.jsonl#0 is not UTF-8 text: byte 0xed at 1")):
        list(Collection({"": corpus}, errors="strict").documents())


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_text_in_utf16_is_told(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a"}\ntext,id\na,1', encoding="utf-16")
    corpus = Files(path=str(tmp_path / name), include=[], text_column="text")
    with pytest.raises(ValueError, match=re.escape(f"{name} is UTF-16 text; convert it to UTF-8")):
        list(Collection({"": corpus}, errors="strict").documents())


@pytest.mark.parametrize("ending", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.parquet", "a.csv"])
def test_tables_are_known_in_any_case_and_packed_or_not(tmp_path, name, ending):
    content = write(tmp_path / f"plain{Path(name.lower()).suffix}", ["a", "b"]).read_bytes()
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    assert [document.text for document in Files(path=str(path), include=[], text_column="text").documents()] == [
        b"a",
        b"b",
    ]
