"""Local files: text, read byte for byte by our own code, and tables."""

from collections.abc import Iterator
from pathlib import Path
from typing import final

from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.corpora.finding import Found, find, root_of
from performer_lm.data.corpora.tables import is_table, read_column
from performer_lm.data.progress import say
from performer_lm.data.reading import read_bytes


@final
class Files(Corpus):
    """A local file, every file of a folder whose name one of the patterns matches, or the files of a glob.

    A text file is one document, as it is on disk (line ends, NULs and all). Each row of a table is one document:
    .jsonl and .parquet always are tables, .csv, .tsv and .json if a column is named. Either may be packed
    (`reading.PACKINGS`). A folder is read with all its subfolders, sorted by relative name (`finding.py`).

    Args:
        path: the file, folder or glob (`data/*.md`, `**` goes across folders).
        include: patterns as in a shell, for folders; `*` also matches across folders, so `*.py` means any depth.
        text_column: of tables, the column that holds the text, `meta.text` where it lies inside `meta`; None for
            `text`.
        validation_path: where the validation documents lie; None holds out some of the others.
    """

    def __init__(
        self,
        *,
        path: str | None,
        include: list[str],
        text_column: str | None = None,
        validation_path: str | None = None,
    ) -> None:
        self._path = path
        self._include = list(include)
        self._text_column = text_column
        self._validation_path = validation_path
        self._roots: dict[str, Path] = {}
        self._told: set[str] = set()

    @property
    def label(self) -> str:
        return f"data.path={self._path}"

    @property
    def validation_label(self) -> str | None:
        return None if self._validation_path is None else f"data.validation_path={self._validation_path}"

    def documents(self) -> Iterator[Document]:
        if self._path is None:
            raise ValueError(
                "data.path is not given: data=files needs data.path=FILE, a folder or a glob "
                "(of a mixture: data.corpora.NAME.path)"
            )
        yield from self._read(self._find("data.path", self._path), held_out=None)
        if self._validation_path is not None:
            found = self._find("data.validation_path", self._validation_path)
            for document in self._read(found, held_out=True):
                yield document._replace(name=f"validation/{document.name}")

    def place(self, name: str) -> str:
        held_out = self._validation_path is not None and name.startswith("validation/")
        path = (self._validation_path if held_out else self._path) or ""
        root = self._roots.get(path) or root_of(path)
        return str(root / (name.removeprefix("validation/") if held_out else name))

    def _read(self, found: Found, *, held_out: bool | None) -> Iterator[Document]:
        for name in found.names:
            if is_table(name, column=self._text_column):
                for row, text in read_column(found.root / name, column=self._text_column):
                    yield Document(f"{name}#{row}", text, held_out)
            else:
                yield Document(name, read_bytes(found.root / name), held_out)

    def _find(self, key: str, path: str) -> Found:
        """Return the files, and print once which others were left out."""
        found = find(key, path, self._include)
        self._roots[path] = found.root  # asked for with every document
        for note in found.notes:
            if note not in self._told:
                self._told.add(note)
                say(note)
        return found
