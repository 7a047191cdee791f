"""Local files: text, read byte for byte by our own code, and tables."""

import bz2
import difflib
import glob
import gzip
import lzma
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, NamedTuple, final

from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.corpora.tables import is_table, read_column

COMPRESSED: Final[Mapping[str, Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@final
class Files(Corpus):
    """A local file, every file of a folder whose name one of the patterns matches, or what a glob finds.

    A text file is one document, as it is on disk (line ends, NULs and all); one ending in .gz, .bz2 or .xz is
    unpacked. Each row of a table is one document: .jsonl and .parquet always are tables, .csv, .tsv and .json if a
    column is named. A folder is read with all its subfolders, sorted by relative name; hidden files and folders
    (`.git`) and `__pycache__` are skipped, links to folders not followed.

    Args:
        path: the file, folder or glob (`data/*.md`, `**` goes across folders).
        include: patterns as in a shell, for folders; `*` also matches across folders, so `*.py` means any depth.
        text_column: of tables, the column that holds the text; None for `text`.
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

    @property
    def label(self) -> str:
        """The path as it was given."""
        return f"data.path={self._path}"

    def documents(self) -> Iterator[Document]:
        """Yield the files in the order of their names, then those for validation."""
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
        """Return the file's path, with the row after it for a table."""
        held_out = self._validation_path is not None and name.startswith("validation/")
        key, path = ("data.validation_path", self._validation_path) if held_out else ("data.path", self._path)
        return str(self._find(key, path or "").root / (name.removeprefix("validation/") if held_out else name))

    def _read(self, found: "_Found", *, held_out: bool | None) -> Iterator[Document]:
        for name in found.names:
            if is_table(name, column=self._text_column):
                for row, text in read_column(found.root / name, column=self._text_column):
                    yield Document(f"{name}#{row}", text, held_out)
            else:
                yield Document(name, read_bytes(found.root / name), held_out)

    def _find(self, key: str, path: str) -> "_Found":
        root = Path(path).expanduser()
        if root.is_dir():
            names = names_below(root)
            chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in self._include)]
            if not chosen:
                raise ValueError(f"{key}={root} has no text: none of its {len(names)} files match {self._include}")
            return _Found(root, chosen)
        if root.exists():
            return _Found(root.parent, [root.name])
        if glob.has_magic(path):
            return _find_glob(key, path)
        raise ValueError(f"{key}={path} does not exist{_nearest(root)}")


class _Found(NamedTuple):
    """Files by their names below a folder, sorted."""

    root: Path
    names: list[str]


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, unpacked if its name ends in .gz, .bz2 or .xz.

    Raises:
        ValueError: naming the file.
    """
    try:
        if unpack := COMPRESSED.get(path.suffix):
            with unpack(path) as file:
                return bytes(file.read())
        return path.read_bytes()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def names_below(root: Path) -> list[str]:
    """Return the relative names of all files, sorted, with `/` between folders."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(folder, name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _find_glob(key: str, pattern: str) -> _Found:
    """Return the files that a glob finds, below the folder where its wildcards begin."""
    whole = Path(pattern).expanduser()
    fixed = next(index for index, part in enumerate(whole.parts) if glob.has_magic(part))
    root = Path(*whole.parts[:fixed])
    found = (Path(name) for name in glob.glob(str(whole), recursive=True))
    names = sorted(
        path.relative_to(root).as_posix() for path in found if path.is_file() and "__pycache__" not in path.parts
    )
    if not names:
        if not root.is_dir():
            raise ValueError(f"{key}={pattern} finds nothing: {root} does not exist{_nearest(root)}")
        there = [str(root / name) for name in names_below(root)]
        near = difflib.get_close_matches(str(whole), there, n=1, cutoff=0.0)
        raise ValueError(f"{key}={pattern} finds no file{f'; the nearest is {near[0]}' if near else ''}")
    return _Found(root, names)


def _nearest(path: Path) -> str:
    """Return a hint that names the entry nearest to the first missing part of a path."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    if not missing.parent.is_dir():
        return f": {missing.parent} is a file"
    near = difflib.get_close_matches(missing.name, os.listdir(missing.parent), n=1, cutoff=0.5)
    return f"; did you mean {missing.parent / near[0]}?" if near else ""
