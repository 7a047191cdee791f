"""Parts of messages to users: a value, an error or the nearest name, in few words."""

import difflib
import os
import re
import reprlib
from collections.abc import Collection, Iterable
from typing import Final

_SHORT: Final = reprlib.Repr()  # of the first few items of a few levels
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 61
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


def short(value: object) -> str:
    """Return a value as an error message can show it, whatever it holds."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def message(error: BaseException) -> str:
    """Return an error's message, or its type where it has none; of a file, its name and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{os.fspath(error.filename)}: {error.strerror.lower()}"
    return str(error) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, choices: Iterable[str], *, prefix: str = "", cutoff: float = 0.5) -> str:
    """Return `; did you mean <prefix><choice>?` for the choice nearest to `name`, or nothing if none is near."""
    nearest = difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


def nearest_key(name: str, known: Collection[str], *, prefix: str = "") -> str:
    """Return the nearest key, or all of them where none is near and the list is short."""
    listed = f" (known: {', '.join(known)})" if 0 < len(known) <= 16 else ""
    return did_you_mean(name, known, prefix=prefix) or listed


def snake_case(name: str) -> str:
    """Return the name of a class as the command line writes it: `FlashTiled` is `flash_tiled`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
