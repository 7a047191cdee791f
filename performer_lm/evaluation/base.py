"""The interface of evaluations, which measure a trained model on a text."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

from performer_lm.data.module import WindowData
from performer_lm.language_model import LanguageModel
from performer_lm.objectives import Objective


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


class Evaluation(ABC):
    """A choice of `task` in `evaluate.py`."""

    @abstractmethod
    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Raise ValueError for a model that cannot be measured so, before any text is read."""

    @abstractmethod
    def __call__(self, subject: Subject) -> float:
        """Measure, print the findings, and return the number that a sweep compares."""
