"""Which documents are trained on, and which are held out.

A document falls to one side by a hash of its name, so that it stays there whatever is added beside it. Documents with
the same text fall together, and none is validated on whose text also stands in training, in whatever corpus.
Letters: `d` documents.
"""

from typing import Annotated, Final, NamedTuple

import numpy as np
from annotated_types import Gt, Lt
from numpy.typing import NDArray

from performer_lm.data.survey import Survey
from performer_lm.ranges import ranged

TRAIN: Final = 0
HELD_OUT: Final = 1
BOTH: Final = 2  # the only document of a corpus: its last part is held out
NEITHER: Final = 3  # given for validation, and its text stands in training; or not asked for

Mask = NDArray[np.bool_]
HeldOut = Annotated[float, Gt(0), Lt(1)]  # a share that leaves neither side nothing


class Split(NamedTuple):
    """The side of every document, `(d,)`, and how many were kept from validation for standing in training too."""

    sides: NDArray[np.int64]
    num_moved: int


@ranged
def split_documents(survey: Survey, *, fraction: HeldOut) -> Split:
    """Give every document its side.

    Of each corpus, documents that are given for validation are held out and the others trained on. Where none is
    given, about `fraction` of the documents are held out, and at least one on each side; a document larger than the
    whole share to hold out stays in training. A single document is cut.

    Raises:
        ValueError: where all that is held out stands in training too.
    """
    sides = np.full(len(survey.sizes), TRAIN)
    _, texts = np.unique(survey.digests, return_inverse=True)
    places = np.zeros(texts.max() + 1)
    np.maximum.at(places, texts, survey.places)  # the same text falls to the same side
    for corpus in np.unique(survey.corpora):
        mine = np.flatnonzero(survey.corpora == corpus)
        given = survey.given[mine]
        if (given >= 0).any():
            sides[mine] = np.where(given == 1, HELD_OUT, TRAIN)
        elif len(mine) == 1:
            sides[mine] = BOTH
        else:
            sides[mine] = _choose(texts[mine], places[texts[mine]], survey.sizes[mine], fraction)
    return _without_copies(sides, texts, survey.given)


def hold_out_all(survey: Survey) -> Split:
    """Hold out all documents; of a corpus that gives some for validation, those."""
    corpora_that_give = np.unique(survey.corpora[survey.given == 1])
    is_wanted = (survey.given == 1) | ~np.isin(survey.corpora, corpora_that_give)
    return Split(np.where(is_wanted, HELD_OUT, NEITHER), 0)


@ranged
def split_text(text: bytes, *, fraction: HeldOut) -> tuple[bytes, bytes]:
    """Split the only document of a corpus by position: its last part, from the start of a line on, is for validation.

    Where no line starts in the last `fraction`, the cut falls between two characters.
    """
    wanted = len(text) - round(len(text) * fraction)
    cut = text.find(b"\n", max(wanted - 1, 0)) + 1
    if not 0 < cut < len(text):
        cut = wanted
        while cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a character
            cut += 1
    return text[:cut], text[cut:]


def _choose(
    texts: NDArray[np.int64], places: NDArray[np.float64], sizes: NDArray[np.int64], fraction: float
) -> NDArray[np.int64]:
    """Return the sides of one corpus's documents, whose texts are numbered; all copies of a text fall together."""
    share = fraction * sizes.sum()
    chosen = (places < fraction) & (sizes <= share)
    by_place = texts[np.lexsort((places, sizes > share))]
    if not chosen.any():
        chosen = texts == by_place[0]
    if chosen.all():
        chosen = texts != by_place[-1]  # leave something to train on
    if not chosen.any():
        chosen[0] = True  # nothing but copies of one text: `_without_copies` will say so
    return np.where(chosen, HELD_OUT, TRAIN)


def _without_copies(sides: NDArray[np.int64], texts: NDArray[np.int64], given: NDArray[np.int64]) -> Split:
    """Keep from validation any text that stands in training: train on it, or leave it out if it was given."""
    trained = np.zeros(texts.max() + 1, dtype=bool)
    trained[texts[sides == TRAIN]] = True
    copies = (sides == HELD_OUT) & trained[texts]
    sides = np.where(copies, np.where(given == 1, NEITHER, TRAIN), sides)
    if not np.isin(sides, (TRAIN, BOTH)).any():
        raise ValueError("nothing is left to train on: all documents are given for validation")
    if not np.isin(sides, (HELD_OUT, BOTH)).any():
        raise ValueError(
            f"nothing is left to validate on: the text of all {int(copies.sum())} documents held out, of "
            f"{len(sides)}, also stands in training"
        )
    return Split(sides, int(copies.sum()))
