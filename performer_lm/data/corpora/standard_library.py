"""The source of the running Python's own standard library."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.corpora.files import names_below, read_bytes


@final
class StandardLibrary(Corpus):
    """About 10 MB of Python that every machine has.

    Left out: tests, installed packages, `encodings` (tables), `idlelib`, `lib2to3`, and the build settings, which name
    the machine's own folders. Sorted by name, e.g. `json/decoder.py`.
    """

    _LEFT_OUT: Final = frozenset(
        {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3"}
    )

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))

    @property
    def label(self) -> str:
        """Its name."""
        return "the standard library"

    def documents(self) -> Iterator[Document]:
        """Yield the `*.py` files."""
        for name in names_below(self._root):
            if name.endswith(".py") and not self._leaves_out(name):
                yield Document(name, read_bytes(self._root / name))

    def place(self, name: str) -> str:
        """Return the file's path."""
        return str(self._root / name)

    def _leaves_out(self, name: str) -> bool:
        *folders, _ = name.split("/")
        build_settings = name.startswith(("config-", "_sysconfigdata"))
        return build_settings or not self._LEFT_OUT.isdisjoint(folders)
