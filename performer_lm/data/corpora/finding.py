"""Files that a path means: one file, the text files of a folder, or the matches of a glob.

A folder is the glob `**/*`, of whose files those are taken whose names match a pattern; so both go through folders
alike. Hidden ones and `__pycache__` are skipped. Links are followed, but no folder or file is taken twice, by whatever
names it is reached. What is no link comes first, so that a link that is added gives no file another name.
"""

import difflib
import errno
import glob
import os
import posixpath
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase, translate
from pathlib import Path
from typing import Final, NamedTuple

from performer_lm.data.reading import check_regular, without_packing
from performer_lm.wording import did_you_mean

EVERYTHING: Final = ("**", "*")
ENDINGS_TOLD: Final = 3  # of files that are left out

Inode = tuple[int, int]
Parts = tuple[str, ...]


class Found(NamedTuple):
    """Files by their names below a folder, sorted, and lines that say which others were left out."""

    root: Path
    names: list[str]
    notes: list[str]


def find(key: str, path: str, include: Sequence[str]) -> Found:
    """Return the files that a path means: a file, a folder or a glob; a name that exists is no glob.

    Args:
        key: the option that gives the path, for messages.
        path: of the files.
        include: of a folder, the patterns of the names to take, whatever their case and however the files are packed.

    Raises:
        ValueError: in one line, where there is no file, or a folder cannot be read.
    """
    whole = Path(path).expanduser()
    try:
        root = root_of(path)
        if root == whole:
            return _find_in_folder(key, whole, include)
        if _exists(whole):
            check_regular(whole)
            return Found(root, [whole.name], [])
        if glob.has_magic(path):
            return _find_by_glob(key, whole, root)
    except OSError as error:
        raise ValueError(f"{key}={path}: {error.filename} cannot be read: {error.strerror}") from None
    raise ValueError(f"{key}={path} does not exist{_nearest(whole)}")


def root_of(path: str) -> Path:
    """Return the folder from which found files are named: a folder itself, a file's, or where wildcards begin."""
    whole = Path(path).expanduser()
    if whole.is_dir():
        return whole
    if _exists(whole) or not glob.has_magic(path):
        return whole.parent
    return Path(*whole.parts[: next(index for index, part in enumerate(whole.parts) if glob.has_magic(part))])


def _find_in_folder(key: str, root: Path, include: Sequence[str]) -> Found:
    pattern = re.compile("|".join(translate(each.lower()) for each in include) or r"(?!)")
    walk = _Walk(root, takes=lambda name: bool(pattern.match(name.lower()) or pattern.match(without_packing(name))))
    names = walk.names(EVERYTHING)
    if not names:
        raise ValueError(f"{key}={root} has no text: none of its {len(walk.others)} files match {list(include)}")
    return Found(root, names, [f"{key}={root}: {note}" for note in walk.notes()])


def _find_by_glob(key: str, whole: Path, root: Path) -> Found:
    if not root.is_dir():
        raise ValueError(f"{key}={whole} finds nothing: {root} does not exist{_nearest(root)}")
    walk = _Walk(root)
    names = walk.names(whole.parts[len(root.parts) :])
    if not names:
        there = [str(root / name) for name in _Walk(root).names(EVERYTHING)]
        near = difflib.get_close_matches(str(whole), there, n=1, cutoff=0.0)
        raise ValueError(f"{key}={whole} finds no file{f'; the nearest is {near[0]}' if near else ''}")
    return Found(root, names, [f"{key}={whole}: {note}" for note in walk.notes()])


class _Walk:
    """One way through a folder, along the parts of a glob; `takes` says which relative names of files are wanted."""

    def __init__(self, root: Path, *, takes: Callable[[str], bool] = lambda name: True) -> None:
        self.others: list[str] = []
        self._special: list[str] = []
        self._num_repeated = 0
        self._root = str(root)
        self._takes = takes
        self._files: dict[Inode, str] = {}
        self._entered: set[tuple[Inode, Parts]] = set()
        self._pending: deque[tuple[str, Parts]] = deque()

    def names(self, parts: Parts) -> list[str]:
        """Return the relative names of the files that are wanted, sorted, with `/` between folders."""
        self._pending.append(("", parts))
        while self._pending:
            self._visit(*self._pending.popleft())
        return sorted(self._files.values())

    def notes(self) -> Iterator[str]:
        """Yield a line for each kind of file that was left out."""
        if count := len(self.others):
            matches = "file that matches" if count == 1 else "files that match"
            yield f"left out {count:,} {matches} no pattern of data.include: {_endings(self.others)}"
        if self._special:
            shown = ", ".join(self._special[:ENDINGS_TOLD])
            yield f"left out {len(self._special):,} that are no regular files (pipes, devices, sockets): {shown}"
        if self._num_repeated:
            yield f"left out {self._num_repeated:,} further names of files that are read already"

    def _visit(self, name: str, parts: Parts) -> None:
        """Take a file, or go on into a folder if parts are left."""
        path = os.path.join(self._root, name)
        try:
            found = os.stat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            if not parts and os.path.islink(path) and self._takes(name):
                raise ValueError(f"{path} cannot be read: the link leads nowhere") from None
            return
        inode = (found.st_dev, found.st_ino)
        if stat.S_ISDIR(found.st_mode):
            if parts and (inode, parts) not in self._entered:
                self._entered.add((inode, parts))
                self._enter(name, parts)
        elif not parts and not stat.S_ISREG(found.st_mode):
            self._special.append(name)
        elif not parts:
            self._take(name, inode)

    def _take(self, name: str, inode: Inode) -> None:
        if inode in self._files:
            self._num_repeated += 1
        elif self._takes(name):
            self._files[inode] = name
        else:
            self.others.append(name)

    def _enter(self, folder: str, parts: Parts) -> None:
        """Put a folder's entries before the pending ones, but its links behind."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            self._pending.appendleft((folder, rest or ("*",)))  # no folder at all
            rest = parts  # or one more
        elif not glob.has_magic(part):
            self._pending.appendleft((posixpath.join(folder, part), rest))
            return
        with os.scandir(os.path.join(self._root, folder)) as entries:
            fitting = sorted((entry for entry in entries if _fits(entry.name, part)), key=lambda entry: entry.name)
        for entry in reversed(fitting):
            name = posixpath.join(folder, entry.name)
            if entry.is_symlink():
                self._pending.append((name, rest))
            elif entry.is_dir(follow_symlinks=False) == bool(rest):
                self._pending.appendleft((name, rest))


def _fits(name: str, part: str) -> bool:
    if name == "__pycache__" or (name.startswith(".") and not part.startswith(".")):
        return False
    return part == "**" or fnmatchcase(name, part)


def _endings(names: Sequence[str]) -> str:
    """Return the commonest endings of file names, and how many names have each."""
    endings: Counter[str] = Counter()
    for name in names:
        bare = without_packing(name)
        endings[posixpath.splitext(bare)[1] + name.lower().removeprefix(bare) or "no ending"] += 1
    commonest = endings.most_common(ENDINGS_TOLD)
    told = [f"{count:,} x {ending}" for ending, count in commonest]
    if rest := len(names) - sum(count for _, count in commonest):
        told.append(f"{rest:,} other{'s' * (rest != 1)}")
    return ", ".join(told)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)  # a link that leads nowhere included


def _nearest(path: Path) -> str:
    """Return a hint that names the entry nearest to the first missing part of a path."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    if not missing.parent.is_dir():
        return f": {missing.parent} is a file"
    return did_you_mean(missing.name, os.listdir(missing.parent), prefix=str(missing.parent / "_")[:-1])
