"""Corpora read together: one policy for bytes that are not UTF-8, and no document without text."""

from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple

from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.reading import BYTE_ORDER_MARK, refuse_utf16

CONTROLS: Final = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1a\x1b"))  # characters that no text holds
LOOKED_AT: Final = 1 << 13  # bytes of a document that is not UTF-8, to tell text from other things

Errors = Literal["strict", "replace", "skip", "bytes"]


class Part(NamedTuple):
    """A document and the number of the corpus that it belongs to."""

    corpus: int
    document: Document


class Collection:
    """Several corpora, one after the other.

    Texts stay as they were found, but for a UTF-8 byte order mark at the very start.

    Args:
        corpora: by name.
        errors: policy for a document that is not UTF-8: `strict` refuses it, naming it and the byte; `replace`
            puts U+FFFD where it is broken; `skip` leaves the document out; `bytes` leaves it as it is.
    """

    def __init__(self, corpora: Mapping[str, Corpus], *, errors: Errors) -> None:
        if not corpora:
            raise ValueError("data.corpora must name at least one corpus")
        self.corpora: Final = dict(corpora)
        self.errors: Final = errors

    def __len__(self) -> int:
        return len(self.corpora)

    @property
    def label(self) -> str:
        return ", ".join(corpus.label for corpus in self.corpora.values())

    def documents(self) -> Iterator[Part]:
        """Yield the documents that have text.

        Raises:
            ValueError: in one line, for a corpus without text (for validation, too), or text that `strict` refuses.
        """
        for index, corpus in enumerate(self.corpora.values()):
            labels = [label for label in (corpus.label, corpus.validation_label) if label is not None]
            seen, kept = [0, 0], [0, 0]
            for document in corpus.documents():
                side = int(document.held_out is True and len(labels) > 1)
                seen[side] += 1
                if text := clean(document.text, errors=self.errors, place=corpus.place(document.name)):
                    kept[side] += 1
                    yield Part(index, document._replace(text=text))
            for label, count, with_text in zip(labels, seen, kept, strict=False):
                if not with_text:
                    raise ValueError(
                        f"{label} has no text: {count} document{'s' * (count != 1)}, all empty or left out"
                    )

    def place(self, part: Part) -> str:
        return list(self.corpora.values())[part.corpus].place(part.document.name)


def clean(text: bytes, *, errors: Errors, place: str) -> bytes:
    """Return a text as the policy wants it, without a byte order mark; nothing for one that is left out.

    Raises:
        ValueError: naming the place and the byte, for a text that is refused.
    """
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        match errors:
            case "replace":
                text = text.decode("utf-8", errors="replace").encode("utf-8")
            case "skip":
                return b""
            case "strict":
                raise ValueError(_refusal(place, text, error.start)) from None
    return text.removeprefix(BYTE_ORDER_MARK)


def _refusal(place: str, text: bytes, start: int) -> str:
    refuse_utf16(text, place)
    found = f"byte 0x{text[start]:02x} at {start}"
    head = text[:LOOKED_AT]
    if len(head.translate(None, CONTROLS)) < len(head):
        return f"{place} is no text: {found} is not UTF-8, and it holds control characters as binary files do"
    return f"{place} is not UTF-8 text: {found}; data.errors=replace, skip or bytes takes the rest"
