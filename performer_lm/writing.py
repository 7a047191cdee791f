"""Files written whole or not at all, nowhere but under their own name, and read no further than is asked for.

A run folder may come from a stranger, who has put a link where a file is about to be written. No function here follows
one: a new file takes the place of whatever has its name, and a file that is appended to must be a plain one.
"""

import csv
import errno
import io
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO


def temporary_of(path: Path) -> Path:
    """Return the name that a file has while this process writes it."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` in one move, once it is whole.

    Args:
        path: of the file.
        sync: whether to wait until the disk has it, so that a machine that fails has the old file or the new.

    Raises:
        OSError: naming `path`, where it cannot be written; what was there stays.
    """
    temporary = temporary_of(path)
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Put `text` in the place of a file's content in one move: whoever reads it finds the old text or the new."""
    with replacing(path, sync=sync) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Put a table in the place of a file's content in one move."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    replace_text(path, text.getvalue())


def write_png(path: Path, figure: Any) -> None:
    """Put a figure of matplotlib in the place of a file's content in one move."""
    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for what the font lacks
        figure.savefig(file, format="png")


def append_text(path: Path, text: str) -> None:
    """Add `text` to the end of a file.

    Raises:
        OSError: naming `path`, where it cannot be written or is not a plain file.
    """
    handle = open_plain(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    left = memoryview(text.encode("utf-8", "backslashreplace"))
    try:
        while left:
            left = left[os.write(handle, left) :]
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        os.close(handle)


def open_to_append(path: Path) -> TextIO:
    """Open a plain file, made where there is none, to add text at its end.

    Raises:
        OSError: naming `path`, where it cannot be written or is not a plain file.
    """
    handle = open_plain(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return os.fdopen(handle, "a", encoding="utf-8", errors="backslashreplace", newline="")


def open_plain(path: Path, flags: int) -> int:
    """Return a handle of a plain file; nothing is followed, waited for, or emptied.

    Raises:
        OSError: naming `path`, where it cannot be opened or is not a plain file.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        check_plain(path)
        raise unwritable(path, error) from error
    if problem := _not_plain(os.fstat(handle)):
        os.close(handle)
        raise OSError(errno.EPERM, problem, str(path))
    return handle


def read_start(path: Path, size: int) -> bytes:
    """Return the first bytes of a file; of a pipe or a device too, without waiting for more than there is.

    Raises:
        OSError: where it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(handle, size)
    finally:
        os.close(handle)


def entries_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield whatever lies below a folder, however deep; links are not followed, folders without leave left out."""
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:  # no folder, gone this very moment, or not for us to see
            continue
        waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        yield from entries


def check_plain(path: Path) -> None:
    """Refuse what is not a plain file of one name; there may be none.

    Raises:
        OSError: naming `path` and what it is.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if problem := _not_plain(found):
        raise OSError(errno.EPERM, problem, str(path))


def unwritable(path: Path, error: OSError) -> OSError:
    """Return an error of writing a file as one that names the file; the system tells of some without."""
    return OSError(error.errno or errno.EIO, f"cannot be written ({error.strerror or error})", str(path))


def _not_plain(found: os.stat_result) -> str:
    """Return what keeps a file from being written to, or nothing."""
    if stat.S_ISLNK(found.st_mode):
        return "is a link, and only files of the folder itself are written to"
    if stat.S_ISDIR(found.st_mode):
        return "is a folder, where a file is to be written"
    if not stat.S_ISREG(found.st_mode):
        return "is a pipe, device or socket, where a file is to be written"
    if found.st_nlink > 1:
        return "has another name (a hard link), and only files of the folder itself are written to: copy the folder"
    return ""
