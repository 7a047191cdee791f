"""Checkpoint files: written so that a kill never costs the last one, read without trusting them.

A file `step=000500.ckpt` has a sidecar `step=000500.ckpt.sha256`, as `sha256sum -c` reads it. `best.ckpt` and
`last.ckpt` are links to such files.
"""

import errno
import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from performer_lm.checkpoint.contents import AVERAGES, OtherFormat, check_content, find_spoilt
from performer_lm.checkpoint.pickles import Foreign
from performer_lm.checkpoint.reading import read_content
from performer_lm.wording import first_line
from performer_lm.writing import read_start, replace_text, temporary_of

_DIGEST = re.compile(r"[0-9a-f]{64}  .+")


class Checkpoint(NamedTuple):
    """A file as read: the project's own section, the weights to use, and the whole content.

    The weights are running averages where training kept some; `content` has those that training goes on from.
    """

    path: Path
    section: dict[str, Any]
    weights: dict[str, Tensor]
    content: dict[str, Any]


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint and its `.sha256`, atomically: whenever this is killed, a good file stands at `path`.

    The new file is complete on disk before it takes the old one's name. The sidecar lists both digests while the name
    changes hands, so it is right before and after.

    Raises:
        OSError: where the file cannot be written, saying how many bytes it needs; nothing of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        digest = _digest(temporary)
        sidecar = sidecar_of(path)
        known = [line for line in _listed(sidecar) if _DIGEST.fullmatch(line)][:1]
        replace_text(sidecar, "".join(f"{line}\n" for line in (f"{digest}  {path.name}", *known)))
        os.replace(temporary, path)
        replace_text(sidecar, f"{digest}  {path.name}\n")
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a failed write into a RuntimeError
        raise _unwritable(path, content, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint on the CPU, executing nothing from it.

    Raises:
        ValueError: for a file that is damaged, foreign, of another format, or holds more than plain data and tensors,
            or weights that are not finite.
    """
    real = _resolve(path)
    sidecar = sidecar_of(real)
    try:
        has_sidecar = os.path.lexists(sidecar)
        if has_sidecar and _digest(real) not in " ".join(_listed(sidecar)):
            raise ValueError(f"{path} is damaged: its content does not match {sidecar.name}")
        opened = _load(path, mmap=False)
        if not has_sidecar:
            _check_records(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    for weights in (opened.content["state_dict"], opened.content.get(AVERAGES, {})):
        if name := find_spoilt(weights):
            raise ValueError(f"{path} is not opened: its weights are not finite ({name}), so its run had failed before")
    return opened


def peek(path: Path) -> Checkpoint:
    """Read a checkpoint as `read` does, quickly: tensors stay on disk until they are looked at, checksums unchecked."""
    return _load(path, mmap=True)


def remove(path: Path) -> None:
    """Delete a checkpoint and its checksum."""
    path.unlink(missing_ok=True)
    sidecar_of(path).unlink(missing_ok=True)


def delete_stale(folder: Path) -> None:
    """Delete remains of killed saves in a folder that no other process writes to."""
    for stale in folder.glob("*.tmp"):
        stale.unlink(missing_ok=True)


def point(link: Path, target: Path) -> None:
    """Make `link` name `target`, a file beside it, in one move; where links do not exist, it becomes a copy."""
    temporary = temporary_of(link)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name)
    except OSError:
        shutil.copyfile(target, temporary)
    os.replace(temporary, link)
    _sync(link.parent)


def sidecar_of(path: Path) -> Path:
    """Return the file that holds a checkpoint's checksum."""
    return path.with_name(f"{path.name}.sha256")


def _load(path: Path, *, mmap: bool) -> Checkpoint:
    real = _resolve(path)
    try:
        content = read_content(real, mmap=mmap)
        check_content(content)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except OtherFormat as error:
        raise ValueError(f"{path} {error}") from error
    except Foreign as error:
        raise ValueError(f"{path} is not a checkpoint of performer_lm: {error}") from error
    except Exception as error:  # whatever the unpickler and the zip reader raise on foreign bytes
        raise ValueError(
            f"{path} is not a checkpoint of performer_lm, or is cut short ({first_line(error)[:120]})"
        ) from error
    content["state_dict"] = dict(content["state_dict"])  # without the attributes of an ordered one
    weights = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
    return Checkpoint(path, content["performer_lm"], weights | content.get(AVERAGES, {}), content)


def _resolve(path: Path) -> Path:
    """Return the file that a path stands for, links followed."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 has a RuntimeError for a loop of links
        reason = error.strerror if isinstance(error, OSError) else "its links form a loop"
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not real.is_file():
        raise ValueError(f"{path} cannot be read: it is not a file")
    return real


def _unwritable(path: Path, content: Mapping[str, Any], error: Exception) -> OSError:
    """Return a failed write as an error for the user: the file, the bytes it needs, the bytes there are."""
    cause = next((link for link in (error, error.__cause__, error.__context__) if isinstance(link, OSError)), None)
    code, reason = (cause.errno, cause.strerror) if cause else (errno.EIO, first_line(error)[:120])
    needed = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(content))
    free = shutil.disk_usage(path.parent).free
    text = f"cannot be written ({reason}): it needs about {needed:,} bytes, and {free:,} are free"
    return OSError(code or errno.EIO, text, str(path))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items: Any = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _listed(sidecar: Path) -> list[str]:
    """Return the lines of a sidecar, which has two at most; of a file that is none the first few."""
    return read_start(sidecar, 1024).decode(errors="replace").splitlines() if os.path.lexists(sidecar) else []


def _check_records(path: Path) -> None:
    """Hold the records of a file that has no sidecar against the checksums in the file itself.

    Raises:
        ValueError: for a file that is damaged, or none of torch's.
    """
    try:
        with zipfile.ZipFile(path) as records:
            for record in records.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{record.filename[:60]!r} is compressed")
                with records.open(record) as file:
                    while file.read(2**20):
                        pass
    except OSError:
        raise
    except Exception as error:  # whatever the zip reader raises on foreign bytes
        raise ValueError(
            f"{path} is not a checkpoint of performer_lm, or is cut short or damaged ({first_line(error)[:120]})"
        ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
