"""A corpus: documents by name, that can be gone through any number of times."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple


class Document(NamedTuple):
    """A text as it was found, byte for byte, and the name that decides on which side of the split it falls."""

    name: str
    text: bytes
    held_out: bool | None = None
    """Whether it is for validation; None lets the split decide."""


class Corpus(ABC):
    """Documents that can be gone through any number of times, always in the same order."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield the documents, one at a time, each under its own name.

        Raises:
            ValueError: in one line, where there is no text or it cannot be read.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of the corpus in messages."""

    @property
    def validation_label(self) -> str | None:
        """The name in messages of the text that is given for validation; None where the split decides."""
        return None

    def place(self, name: str) -> str:
        """Return where a document lies, for messages."""
        return name
