"""`evaluate.py task=backends`: one checkpoint under every attention backend that can take it.

Letters: `b` batch, `n` tokens.
"""

import ctypes
import io
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch

from performer_lm import checkpoint
from performer_lm.attention.base import AttentionFactory
from performer_lm.attention.joining import count_bytes
from performer_lm.evaluation.base import (
    Evaluation,
    Subject,
    check_writable,
    pick_windows,
    print_table,
    spread_places,
)
from performer_lm.evaluation.perplexity import measure_perplexity
from performer_lm.evaluation.scoring import score_windows
from performer_lm.language_model import LanguageModel
from performer_lm.memory import peak_memory, reset_peak_memory
from performer_lm.objectives import shift
from performer_lm.ranges import Count, ranged
from performer_lm.wording import first_line
from performer_lm.writing import write_csv

TRAINED: Final = "as trained"


class Line(NamedTuple):
    """Figures of the weights under a backend; None where it cannot take them."""

    backend: str
    bits_per_byte: float | None
    tokens_per_second: float | None
    peak_bytes: int | None  # above what is held before
    state_bytes: int | None  # of a row, after a window
    note: str  # why there are no numbers, or which of its weights a backend had to draw


@ranged
@final
class CompareBackends(Evaluation):
    """Measure the same weights under each backend: bits per byte, speed, memory, and the size of the decoding state.

    A backend that cannot take the checkpoint is a line with the reason. Prints a table; writes `backends.csv` into the
    run's folder.

    Args:
        backends: factories of backends by name.
        windows: of held-out text to measure, evenly spaced; None for all.
    """

    def __init__(self, *, backends: dict[str, AttentionFactory], windows: Count | None) -> None:
        self.backends, self.windows = backends, windows

    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Take any model, and want a folder to write to."""
        check_writable(folder)

    def __call__(self, subject: Subject) -> float:
        """Return the bits per byte of the model as it is."""
        lines = [_measure(TRAINED, subject, windows=self.windows)]
        lines += [self._measure_with(name, factory, subject) for name, factory in self.backends.items()]
        path = subject.folder / "backends.csv"
        write_csv(path, Line._fields, lines)
        columns = ["backend", "bits per byte", "tokens/s", "peak memory", "state of a row"]
        print_table("the same weights under each backend", columns, map(_cells, lines))
        print(*(f"{line.backend}: {line.note}" for line in lines if line.note), f"wrote {path}", sep="\n")
        own = lines[0].bits_per_byte
        assert own is not None, "the model as it is was measured, or its error was raised"
        return own

    def _measure_with(self, name: str, factory: Any, subject: Subject) -> Line:
        try:
            with redirect_stdout(io.StringIO()) as told:
                model, _ = checkpoint.open_model(subject.checkpoint, attn=factory)
            line = _measure(name, subject._replace(model=model.to(subject.device)), windows=self.windows)
            return line._replace(note=told.getvalue().strip().removeprefix("note: "))
        except (ValueError, FloatingPointError) as error:
            return Line(name, None, None, None, None, first_line(error))


def _measure(name: str, subject: Subject, *, windows: int | None) -> Line:
    model, objective, data, device = subject.model, subject.objective, subject.data, subject.device
    places = spread_places(data.held_out, windows)
    options: Any = {"objective": objective, "batch_size": data.batch_size, "separator": data.separator}
    for is_warm in (False, True):  # what is loaded or compiled once is no part of the findings
        if is_warm:
            release_memory()
            reset_peak_memory(device)
            before = peak_memory(device)
        for _ in score_windows(model, data.held_out, places=places[: data.batch_size], **options):
            pass
    peak = peak_memory(device) - before
    started = time.perf_counter()
    scores = [*score_windows(model, data.held_out, places=places, **options)]
    seconds = time.perf_counter() - started
    found = measure_perplexity(scores, byte_lengths=data.held_out.byte_lengths, name=objective.predicted)
    return Line(name, found.bits_per_byte, found.tokens / seconds, peak, _state_bytes(subject), "")


def release_memory() -> None:
    """Give back to the system what freed tensors have left on the heap, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@torch.inference_mode()
def _state_bytes(subject: Subject) -> int | None:
    """Return the bytes of a row's decoding state after a window; None for a model that does not decode."""
    if not subject.model.decodes:
        return None
    tokens = shift(pick_windows(subject.data.held_out, 1))[0].to(subject.device)
    return count_bytes(subject.model.start(tokens, max_len=tokens.shape[1])[1])


def _cells(line: Line) -> list[str]:
    def spell(value: float | None, form: str, unit: float = 1) -> str:
        return "-" if value is None else form.format(value / unit)

    bits, speed = spell(line.bits_per_byte, "{:.4f}"), spell(line.tokens_per_second, "{:,.0f}")
    return [
        line.backend,
        bits,
        speed,
        spell(line.peak_bytes, "{:.1f} MiB", 2**20),
        spell(line.state_bytes, "{:.1f} KiB", 2**10),
    ]
