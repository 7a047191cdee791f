"""Documents to flat id arrays on disk, on several threads, in one reading.

An array reads `end, document, end, document, ..., end`: each document starts after an end token and closes with one,
so that, given the first id, every byte of text is predicted once. Corpora follow one another in it and share the end
token between them. Held-out documents of a corpus stand in the order of a hash of their names, so that the first of
them are a fair sample.
Letters: `p` corpora.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from performer_lm.data.corpora.collection import Collection, Part
from performer_lm.data.held_out import BOTH, HELD_OUT, NEITHER, Split, split_text
from performer_lm.data.ids import Ids
from performer_lm.data.progress import PreparationProgress
from performer_lm.data.survey import Survey, digest_of
from performer_lm.data.tokenizer import Tokenizer

BATCH_BYTES: Final = 1 << 20  # text that a thread encodes in one go
CHANGED: Final = "the corpus changed while it was tokenized; start again once it is still"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Piece(NamedTuple):
    """A text on one side of the split."""

    part: Part
    place: float
    text: bytes
    held_out: bool


class Built(NamedTuple):
    """Positions where the ids of each corpus start and stop, `(p + 1,)` a side, and counts of documents."""

    train_bounds: list[int]
    held_out_bounds: list[int]
    num_documents: tuple[int, int]
    num_inexact: int
    """Documents that the tokenizer does not give back byte for byte."""


def pieces(collection: Collection, survey: Survey, split: Split, *, fraction: float | None) -> Iterator[Piece]:
    """Yield all texts with their sides, or raise ValueError where they are not those surveyed."""
    sides = iter(zip(survey.digests, survey.places, split.sides, strict=True))
    for part in collection.documents():
        digest, place, side = next(sides, (None, 0.0, NEITHER))
        if digest is None or digest.tobytes() != digest_of(part.document.text):
            raise ValueError(CHANGED)
        if side == BOTH:
            assert fraction is not None, "nothing is cut where all is held out"
            first, last = split_text(part.document.text, fraction=fraction)
            yield Piece(part, place, first, False)
            yield Piece(part, place, last, True)
        elif side != NEITHER:
            yield Piece(part, place, part.document.text, bool(side == HELD_OUT))
    if next(sides, None) is not None:
        raise ValueError(CHANGED)


def write_arrays(
    folder: Path,
    texts: Iterable[Piece],
    tokenizer: Tokenizer,
    *,
    collection: Collection,
    dtype: np.dtype[Any],
    threads: int,
    progress: PreparationProgress,
) -> Built:
    """Write `train.bin`, `validation.bin` and `validation_sizes.bin`, the bytes of text of each held-out document."""
    lengths = tokenizer.byte_lengths()
    end = np.array([tokenizer.end_id], dtype=dtype)
    train, held_out = _Track(len(collection)), _HeldOut(len(collection))
    inexact = 0
    with (folder / "train.bin").open("wb") as file, (folder / "unordered.bin").open("w+b") as unordered:
        file.write(end.tobytes())
        batches = in_order(_encoder(tokenizer, collection), _batches(texts), threads=threads)
        for batch, encoded in batches:
            for piece, ids in zip(batch, encoded, strict=True):
                track, target = (held_out.track, unordered) if piece.held_out else (train, file)
                target.write(ids.astype(dtype).tobytes() + end.tobytes())
                track.add(piece.part.corpus, len(ids) + 1)
                if piece.held_out:
                    held_out.add(piece.place, len(ids) + 1, len(piece.text))
                inexact += int(lengths[ids].sum()) != len(piece.text)
            progress.add(sum(len(piece.text) for piece in batch))
        sync(file)
        unordered.flush()
        sizes = held_out.write(folder / "validation.bin", unordered, end, dtype)
    (folder / "unordered.bin").unlink()
    with (folder / "validation_sizes.bin").open("wb") as file:
        file.write(sizes.tobytes())
        sync(file)
    return Built(train.bounds(), held_out.track.bounds(), (train.documents, held_out.track.documents), inexact)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int
) -> Iterator[tuple[Item, Result]]:
    """Yield every item with its result of the function, in order, a few of them at work at any time."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > 2 * threads:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def sync(file: IO[bytes]) -> None:
    """Put a file on the disk: a rename may not overtake it."""
    file.flush()
    os.fsync(file.fileno())


class _Track:
    """Where the ids of each corpus stop, from the end token before its first document."""

    def __init__(self, num_corpora: int) -> None:
        self._lengths = [0] * num_corpora
        self.documents = 0

    def add(self, corpus: int, num_ids: int) -> None:
        self._lengths[corpus] += num_ids
        self.documents += 1

    def bounds(self) -> list[int]:
        """Return the positions of the end tokens between corpora, `(p + 1,)`."""
        return [0, *(int(bound) for bound in np.cumsum(self._lengths))]


class _HeldOut:
    """Held-out documents as they came, to be put in the order of their places."""

    def __init__(self, num_corpora: int) -> None:
        self.track = _Track(num_corpora)
        self._places: list[float] = []
        self._lengths: list[int] = []
        self._sizes: list[int] = []

    def add(self, place: float, num_ids: int, num_bytes: int) -> None:
        self._places.append(place)
        self._lengths.append(num_ids)
        self._sizes.append(num_bytes)

    def write(self, path: Path, unordered: IO[bytes], end: Ids, dtype: np.dtype[Any]) -> NDArray[np.int64]:
        """Write the ids, each corpus's documents in order, and return their bytes of text in that order."""
        starts = np.cumsum([0, *self._lengths])
        corpora = np.searchsorted(self.track.bounds(), starts[:-1], side="right")
        order = np.lexsort((np.array(self._places), corpora))
        with path.open("wb") as file:
            file.write(end.tobytes())
            for document in order:
                unordered.seek(int(starts[document]) * dtype.itemsize)
                file.write(unordered.read(self._lengths[document] * dtype.itemsize))
            sync(file)
        return np.array(self._sizes, dtype=np.int64)[order]


def _encoder(tokenizer: Tokenizer, collection: Collection) -> Callable[[list[Piece]], list[Ids]]:
    """Return a function from pieces to their ids, whose refusals name the document."""

    def encode(batch: list[Piece]) -> list[Ids]:
        try:
            return list(tokenizer.encode_batch([piece.text for piece in batch]))
        except ValueError:
            for piece in batch:
                try:
                    tokenizer.encode(piece.text)
                except ValueError as error:
                    raise ValueError(f"{collection.place(piece.part)}: {error}") from None
            raise

    return encode


def _batches(texts: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Gather texts into lists of about `BATCH_BYTES`."""
    batch: list[Piece] = []
    size = 0
    for piece in texts:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
