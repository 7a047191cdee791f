"""What went wrong, said once and plainly, and the exit code it means.

| code | meaning | shown |
|---|---|---|
| 0 | done | |
| 1 | an error of ours | traceback |
| 2 | usage or config | one `error:` line for each problem |
| 3 | a loss or gradient was not finite (`FloatingPointError`) | one line |
| 4 | out of memory | one line, and what to lower |
| 130 | interrupted | one line |
| 143 | terminated | one line |
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from performer_lm.wording import message

ERROR, USAGE, NON_FINITE, OUT_OF_MEMORY, INTERRUPTED, TERMINATED = 1, 2, 3, 4, 130, 143

LEVERS = (
    "raise trainer.accumulate_grad_batches: the same batch in smaller pieces, the same result",
    "set model.recompute=true: each branch's activations are computed anew in the backward",
    "set objective.chunk_size=512: the logits of fewer tokens at once",
    "lower data.context or data.batch_size",
    "set trainer.precision=bf16-mixed on an accelerator",
    "lower model.dim or model.depth",
)


class UsageError(ValueError):
    """A mistake of the user's: one line for each problem, exit code 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class JobFailed(Exception):
    """A job of a sweep that failed and was reported; holds its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError of a constructor or an OSError of a file into a `UsageError`."""
    try:
        yield
    except (UsageError, BrokenPipeError):  # of output whose reader has gone
        raise
    except (ValueError, OSError) as error:
        raise UsageError(*message(error).splitlines()) from error


def report(error: BaseException, *, job: str = "", show_traceback: bool = False) -> int:
    """Print `error` to stderr as its exit code asks, and return that code. `job` names one job of a sweep."""
    if isinstance(error, SystemExit):
        return _exit_code(error)
    if isinstance(error, JobFailed):
        return error.code
    if isinstance(error, BrokenPipeError):
        _close_stdout()
        return ERROR
    if not isinstance(error, OSError) and _follows_interrupt(error):  # but what then could not be written is told
        error = KeyboardInterrupt()
    code, problems = _verdict(error)
    is_told = isinstance(error, OSError) and error.filename is not None  # a disk, not a mistake of ours
    if show_traceback or (code == ERROR and not is_told):
        traceback.print_exception(error)
    for problem in problems:
        print(f"{_label()} {job}{problem}", file=sys.stderr)
    return code


def in_short(error: BaseException) -> str:
    """Return the first line of the report on an error."""
    return _verdict(error)[1][0].partition("\n")[0]


def _verdict(error: BaseException) -> tuple[int, tuple[str, ...]]:
    if isinstance(error, UsageError):
        return USAGE, error.problems
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ("interrupted",)
    if isinstance(error, FloatingPointError):
        return NON_FINITE, (message(error),)
    if _is_out_of_memory(error):
        first = message(error).partition("\n")[0]
        return OUT_OF_MEMORY, ("\n  ".join((f"out of memory: {first}", *getattr(error, "__notes__", ()), *LEVERS)),)
    return ERROR, (f"{type(error).__name__}: {message(error)}".partition("\n")[0],)


def _is_out_of_memory(error: BaseException) -> bool:
    if not isinstance(error, MemoryError | RuntimeError):
        return False
    from performer_lm.memory import is_out_of_memory  # imports torch, as whatever raised this has done

    return is_out_of_memory(error)


def _follows_interrupt(error: BaseException) -> bool:
    """Return True for an error in the wake of Ctrl-C: libraries fail as they put away what was half done."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, KeyboardInterrupt):
        link = link.__cause__ or link.__context__
    return link is not None


def _exit_code(error: SystemExit) -> int:
    """Return the code of a SystemExit, seeing through Lightning's two: SIGTERM has no code, and Ctrl-C has 1."""
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")
    if lightning is not None and isinstance(error, lightning.SIGTERMException):
        print(f"{_label()} terminated", file=sys.stderr)
        return TERMINATED
    if _follows_interrupt(error):
        return INTERRUPTED
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)
        return ERROR
    return error.code or 0


def _label() -> str:
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return "\033[1;31merror:\033[0m" if coloured else "error:"


def _close_stdout() -> None:
    """Discard the output that is still buffered, for its reader has gone (`generate.py ... | head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
