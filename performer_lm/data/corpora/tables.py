"""The text column of local tables (jsonl, parquet, csv), read row by row.

A file is read as a stream and nothing of it is copied. Row numbers count from 0, and every row has one. Texts are as
they were found, UTF-8 or not.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Final

from performer_lm.data.corpora.columns import pick_column, texts_of
from performer_lm.data.corpora.json_rows import read_json_column
from performer_lm.data.reading import BYTE_ORDER_MARK, open_unpacked, refuse_utf16, without_packing
from performer_lm.wording import first_line

TABLES_IF_ASKED: Final = (".csv", ".tsv", ".json")  # plain text, unless a column is named
ROWS_AT_ONCE: Final = 1000
BYTES: Final = "latin-1"  # an encoding with a character for every byte: texts come out as they went in


def is_table(name: str, *, column: str | None) -> bool:
    """Return True if a file is read row by row."""
    suffix = _suffix(name)
    return suffix in READERS and (column is not None or suffix not in TABLES_IF_ASKED)


def read_column(path: Path, *, column: str | None) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the text of each row of a file that `is_table`; a row without text is empty.

    Args:
        path: of the file.
        column: of the text; None for `text`.

    Raises:
        ValueError: naming the file, and the nearest column where there is none of that name.
    """
    try:
        yield from enumerate(READERS[_suffix(path.name)](path, column or "text"))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        said = first_line(error)
        raise ValueError(said if said.startswith(str(path)) else f"{path} cannot be read: {said}") from None


def _read_parquet_column(path: Path, column: str) -> Iterator[bytes]:
    from pyarrow import BufferReader, parquet  # comes with datasets

    is_packed = without_packing(path.name) != path.name.lower()
    with open_unpacked(path) as unpacked:
        source = BufferReader(unpacked.read()) if is_packed else path
    with parquet.ParquetFile(source) as file:
        texts_of(file.schema_arrow.empty_table(), column, where=str(path))  # refuses the column before rows are read
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
            yield from (text or b"" for text in texts_of(batch, column, where=str(path)))


def _read_csv_column(path: Path, column: str) -> Iterator[bytes]:
    import pandas  # comes with datasets

    with open_unpacked(path) as file:
        head = file.peek(len(BYTE_ORDER_MARK))
        refuse_utf16(head, str(path))
        if not head:
            return
        if head.startswith(BYTE_ORDER_MARK):
            file.read(len(BYTE_ORDER_MARK))
        separator = "\t" if _suffix(path.name) == ".tsv" else ","
        options: dict[str, Any] = {"dtype": str, "na_filter": False, "encoding": BYTES}  # "NA" is text
        with pandas.read_csv(file, sep=separator, chunksize=ROWS_AT_ONCE, **options) as chunks:
            for chunk in chunks:
                names = [str(name).encode(BYTES, "replace").decode("utf-8", "replace") for name in chunk.columns]
                place = names.index(pick_column(column, names, where=str(path)))
                if not isinstance(chunk.index, pandas.RangeIndex):  # pandas took first fields for names of the rows
                    raise ValueError(f"{path} has rows of more fields than its header names")
                yield from (text.encode(BYTES) for text in chunk.iloc[:, place])


def _suffix(name: str) -> str:
    return PurePath(without_packing(name)).suffix


READERS: Final[Mapping[str, Callable[[Path, str], Iterator[bytes]]]] = {
    ".jsonl": read_json_column,
    ".ndjson": read_json_column,
    ".json": read_json_column,
    ".parquet": _read_parquet_column,
    ".csv": _read_csv_column,
    ".tsv": _read_csv_column,
}
