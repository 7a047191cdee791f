"""The text column of local tables (jsonl, parquet, csv), read row by row with HF `datasets`.

A file is read as a stream and nothing of it is copied. Row numbers count from 0, and every row has one.
"""

import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

TABLES: Final = {".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
TABLES_IF_ASKED: Final = {".csv": "csv", ".tsv": "csv", ".json": "json"}  # plain text, unless a column is named
PACKED: Final = (".gz", ".bz2", ".xz", ".zst")
ROWS_AT_ONCE: Final = 1000


def is_table(name: str, *, column: str | None) -> bool:
    """Tell whether a file is read row by row."""
    suffix = _suffix(Path(name))
    return suffix in TABLES or (column is not None and suffix in TABLES_IF_ASKED)


def read_column(path: Path, *, column: str | None) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the text of each row; a row without text is empty.

    Args:
        path: of a file that `is_table`.
        column: that holds the text; None for `text`.

    Raises:
        ValueError: naming the file, and the nearest column where there is none of that name.
    """
    for row, text in enumerate(_strings(path, column or "text")):
        try:
            yield row, (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{path} row {row} cannot be written as UTF-8: {error.reason}") from None


def pick_column(name: str, columns: Sequence[str], *, where: str) -> str:
    """Return `name` if it is one of the columns.

    Raises:
        ValueError: naming the nearest column, and all of them where there are few.
    """
    if name in columns:
        return name
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.4)
    hint = f"; did you mean data.text_column={near[0]}?" if near else ""
    listed = f" (columns: {', '.join(columns)})" if 0 < len(columns) <= 16 else ""
    raise ValueError(f"{where} has no column '{name}'{hint}{listed}")


def texts_of(batch: Any, column: str, *, where: str) -> list[str | None]:
    """Return a column of an arrow table as strings.

    Raises:
        ValueError: if it holds something else.
    """
    found = batch.column(column)
    if str(found.type) not in ("string", "large_string", "string_view", "null"):
        raise ValueError(f"{where}: column '{column}' holds {found.type}, not text")
    strings: list[str | None] = found.to_pylist()
    return strings


def import_datasets() -> Any:
    """Return HF `datasets`, quiet.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"tables and hub data need the package '{error.name}': pip install datasets") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # every retry, where there is no network
    return datasets


def first_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _strings(path: Path, column: str) -> Iterator[str | None]:
    try:
        for batch in _batches(path, column):
            pick_column(column, batch.column_names, where=str(path))
            yield from texts_of(batch, column, where=str(path))
    except ValueError as error:
        said = first_line(error)
        raise ValueError(said if said.startswith(str(path)) else f"{path} cannot be read: {said}") from None
    except (OSError, RuntimeError, ImportError) as error:
        said = first_line(error)
        raise ValueError(f"{path} cannot be read: {said}") from None


def _batches(path: Path, column: str) -> Iterator[Any]:
    """Yield arrow tables of rows; of parquet, only the wanted column is read."""
    kind = {**TABLES, **TABLES_IF_ASKED}[_suffix(path)]
    options: dict[str, Any] = {}
    if not path.stat().st_size:
        return
    if kind == "csv":
        options = {"sep": "\t" if _suffix(path) == ".tsv" else ","}
        columns = _header(path, **options)
        pick_column(column, columns, where=str(path))
        strings = {name: import_datasets().Value("string") for name in columns}
        options |= {"features": import_datasets().Features(strings), "keep_default_na": False}  # "NA" is text
    elif kind == "parquet":
        columns = _stream(kind, path).column_names
        options = {"columns": [pick_column(column, columns, where=str(path))]}
    yield from _stream(kind, path, **options).iter(batch_size=ROWS_AT_ONCE)


def _header(path: Path, *, sep: str) -> list[str]:
    import pandas  # comes with datasets

    return [str(name) for name in pandas.read_csv(path, sep=sep, nrows=0).columns]


def _stream(kind: str, path: Path, **options: Any) -> Any:
    data = import_datasets().load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
    return data.with_format("arrow")


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix
