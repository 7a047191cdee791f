"""The source of the running Python's own standard library."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.reading import read_bytes


@final
class StandardLibrary(Corpus):
    """About 10 MB of Python that every machine has.

    Left out: tests, installed packages, `encodings` (tables), `idlelib`, `lib2to3`, and the build settings, which name
    the machine's own folders. Sorted by name, e.g. `json/decoder.py`.
    """

    _LEFT_OUT: Final = frozenset(
        [
            "test",
            "tests",
            "idle_test",
            "site-packages",
            "dist-packages",
            "encodings",
            "idlelib",
            "lib2to3",
            "__pycache__",
        ]
    )

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))

    @property
    def label(self) -> str:
        return "the standard library"

    def documents(self) -> Iterator[Document]:
        for name in sorted(self._names()):
            yield Document(name, read_bytes(self._root / name))

    def place(self, name: str) -> str:
        return str(self._root / name)

    def _names(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self._root, onerror=_refuse):
            folders[:] = filter(self._takes, folders)
            below = Path(folder).relative_to(self._root)
            yield from ((below / name).as_posix() for name in files if name.endswith(".py") and self._takes(name))

    def _takes(self, name: str) -> bool:
        return name not in self._LEFT_OUT and not name.startswith((".", "config-", "_sysconfigdata"))


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")
