"""Where text comes from: a corpus is a list of named documents, read byte by byte from this machine.

Text stays as it is on disk (line ends, NULs and all), but for a UTF-8 byte order mark at the very start, which is an
encoding's signature and no text. What is not UTF-8 is refused with the file and the byte.
"""

import difflib
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple, final

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


class Document(NamedTuple):
    """A text and the name that decides on which side of the split it falls."""

    name: str
    text: bytes


class Corpus(ABC):
    """Documents that can be gone through any number of times, always in the same order."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield the documents, one at a time, none of them empty, each under its own name.

        Raises:
            ValueError: in one line, where there is no text or it cannot be read.
        """


@final
class StandardLibrary(Corpus):
    """The source of the running Python's standard library: about 10 MB that every machine has.

    Left out: tests, installed packages, `encodings` (tables), `idlelib`, `lib2to3`, and the build settings, which name
    the machine's own folders. Sorted by name, e.g. `json/decoder.py`.
    """

    _LEFT_OUT: Final = frozenset(
        {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3"}
    )

    def documents(self) -> Iterator[Document]:
        """Yield the `*.py` files."""
        root = Path(sysconfig.get_path("stdlib"))
        names = [name for name in _names_below(root) if name.endswith(".py") and not self._leaves_out(name)]
        yield from _read_all(root, names)

    def _leaves_out(self, name: str) -> bool:
        *folders, _ = name.split("/")
        build_settings = name.startswith(("config-", "_sysconfigdata"))
        return build_settings or not self._LEFT_OUT.isdisjoint(folders)


@final
class Files(Corpus):
    """A local text file, or every file of a folder whose name one of the patterns matches.

    A folder is read with all its subfolders, sorted by relative name; hidden files and folders (`.git`) and
    `__pycache__` are skipped, links to folders not followed.

    Args:
        path: the file or folder.
        include: patterns as in a shell; `*` also matches across folders, so `*.py` means any depth. A single file is
            read whatever its name.
    """

    def __init__(self, *, path: str | None, include: list[str]) -> None:
        self._path = path
        self._include = list(include)

    def documents(self) -> Iterator[Document]:
        """Yield the file, or the folder's files."""
        if self._path is None:
            raise ValueError("data.path is not given: data=files needs data.path=FILE or data.path=FOLDER")
        root = Path(self._path).expanduser()
        if not root.exists():
            raise ValueError(f"data.path={self._path} does not exist{_nearest(root)}")
        if root.is_dir():
            yield from self._folder(root)
        else:
            yield from _read_all(root.parent, [root.name])

    def _folder(self, root: Path) -> Iterator[Document]:
        names = _names_below(root)
        chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in self._include)]
        if not chosen:
            raise ValueError(f"data.path={root} has no text: none of its {len(names)} files match {self._include}")
        yield from _read_all(root, chosen)


class Split(NamedTuple):
    """The names of the documents on each side.

    Validation documents stand in the order of their hash, so that any prefix of them is a fair sample; training
    documents in the corpus's own order.
    """

    train: list[str]
    validation: list[str]


def split_names(sizes: dict[str, int], *, fraction: float) -> Split:
    """Split documents by a hash of their names, so that a document stays on its side whatever is added beside it.

    About `fraction` of the names go to validation, and at least one to each side. A document larger than the whole
    share to hold out stays in training, lest validation be that document.

    Args:
        sizes: the bytes of each document by name, in the corpus's order.
        fraction: the share to hold out, of names and of bytes.

    Raises:
        ValueError: for less than two documents, or a fraction that leaves one side nothing.
    """
    _check_fraction(fraction)
    if len(sizes) < 2:
        raise ValueError(f"a split by document needs at least 2 documents, got {len(sizes)}")
    share = fraction * sum(sizes.values())
    by_place = sorted(sizes, key=lambda name: (sizes[name] > share, _place(name)))
    chosen = sum(_place(name) < fraction and sizes[name] <= share for name in sizes)
    validation = by_place[: min(max(chosen, 1), len(sizes) - 1)]
    held_out = set(validation)
    return Split(train=[name for name in sizes if name not in held_out], validation=validation)


def split_text(text: bytes, *, fraction: float) -> tuple[bytes, bytes]:
    """Split the only document of a corpus by position: its last part, from the start of a line on, is for validation.

    Where no line starts in the last `fraction`, the cut falls between two characters.
    """
    _check_fraction(fraction)
    wanted = len(text) - round(len(text) * fraction)
    cut = text.find(b"\n", max(wanted - 1, 0)) + 1
    if not 0 < cut < len(text):
        cut = wanted
        while cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a character
            cut += 1
    return text[:cut], text[cut:]


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"data.validation_fraction ({fraction}) must lie between 0 and 1")


def _place(name: str) -> float:
    """Return where in [0, 1) a name falls."""
    return int.from_bytes(sha256(name.encode("utf-8", errors="surrogateescape")).digest()[:6], "big") / 2**48


def _names_below(root: Path) -> list[str]:
    """Return the relative names of all files, sorted, with `/` between folders."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(folder, name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _read_all(root: Path, names: list[str]) -> Iterator[Document]:
    empty = True
    for name in names:
        if text := read_text(root / name):
            empty = False
            yield Document(name, text)
    if empty:
        where = root / names[0] if len(names) == 1 else root
        raise ValueError(f"{where} has no text: {len(names)} file{'s' * (len(names) != 1)} of 0 bytes")


def read_text(path: Path) -> bytes:
    """Return a file's bytes without a byte order mark.

    Raises:
        ValueError: naming the file, and the byte that is not UTF-8.
    """
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        if text.startswith(UTF16_MARKS):
            raise ValueError(f"{path} is UTF-16 text; convert it to UTF-8") from None
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{text[error.start]:02x} at {error.start}") from None
    return text.removeprefix(BYTE_ORDER_MARK)


def _nearest(path: Path) -> str:
    """Return a hint that names the entry nearest to the first missing part of a path."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    if not missing.parent.is_dir():
        return f": {missing.parent} is a file"
    near = difflib.get_close_matches(missing.name, os.listdir(missing.parent), n=1, cutoff=0.5)
    return f"; did you mean {missing.parent / near[0]}?" if near else ""
