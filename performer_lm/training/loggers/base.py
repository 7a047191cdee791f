"""The interface of a run's loggers, beyond Lightning's."""

from abc import ABC, abstractmethod
from pathlib import Path


class RunLogger(ABC):
    """A logger that belongs to one run, which may be stopped and resumed."""

    @abstractmethod
    def begin(self, folder: Path, *, step: int) -> None:
        """Begin to log in an existing run folder; logs of an earlier process after `step` are void."""

    def log_sample(self, prompt: str, continuation: str, *, step: int) -> None:
        """Keep a prompt and its continuation by the model, where the logger has a place for text."""
        return
