"""The interface of evaluations, which measure a trained model on a text."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from performer_lm.checkpoint import Checkpoint
from performer_lm.data.ids import Indices
from performer_lm.data.module import WindowData
from performer_lm.data.windows import IGNORE, FiniteWindows
from performer_lm.language_model import LanguageModel
from performer_lm.model import PerformerLM
from performer_lm.objectives import Objective

CANDIDATES: Final = 8  # windows looked at for each that is taken


class Subject(NamedTuple):
    """A trained model and a text to measure it on."""

    model: LanguageModel
    """In evaluation mode, on its device."""
    objective: Objective
    """Of the model's training."""
    data: WindowData
    """`held_out` is prepared; of the model's own vocabulary."""
    folder: Path
    """Of the run it comes from, for files that belong to it."""
    checkpoint: Checkpoint
    """The file it comes from."""

    @property
    def device(self) -> torch.device:
        """Return the model's device."""
        return self.model.head.weight.device


class Evaluation(ABC):
    """A choice of `task` in `evaluate.py`."""

    @abstractmethod
    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Raise ValueError for a model that cannot be measured so, before any text is read."""

    @abstractmethod
    def __call__(self, subject: Subject) -> float:
        """Measure, print the findings, and return the number that a sweep compares."""


def check_next_token(model: LanguageModel, user: str) -> PerformerLM:
    """Return a model that predicts each next token of a window.

    Raises:
        ValueError: for any other.
    """
    if isinstance(model, PerformerLM) and model.decodes:
        return model
    raise ValueError(f"{user} is for models that predict each next token (objective=clm), which this one does not")


def check_writable(folder: Path) -> None:
    """Raise ValueError for a folder that tables and pictures cannot be written to."""
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to, and that is where table and pictures would go")


def open_console() -> Console:
    """Return a console for tables; a file has no edge to wrap at."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, labels: int = 1) -> None:
    """Print a table, the first `labels` columns of which are names and the others numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < labels else "right")
    for row in rows:
        table.add_row(*row)
    open_console().print(table, markup=False)  # names are of files, which may hold brackets


def spread_places(windows: FiniteWindows, count: int | None) -> Indices:
    """Return the numbers of `count` windows that lie evenly over a text; of all, for None or where there are fewer."""
    return np.unique(np.linspace(0, len(windows) - 1, min(count or len(windows), len(windows))).astype(np.int64))


def pick_windows(windows: FiniteWindows, count: int) -> Tensor:
    """Return the longest of evenly spaced windows, `(count, n + 1)`, cut to the shortest of them: without fill."""
    rows = windows.rows(spread_places(windows, CANDIDATES * count))
    lengths = (rows != IGNORE).sum(dim=1)
    taken = lengths.argsort(descending=True, stable=True)[:count].sort().values
    return rows[taken, : int(lengths[taken].min())]
