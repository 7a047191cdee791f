"""Windows cut from documents as they come, and the place that each batch was read up to.

A resumed run loses the rest of a document and goes on with the next one: the place is not one number.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from performer_lm.data.corpora.collection import Errors, clean
from performer_lm.data.corpora.hub import Hub
from performer_lm.data.ids import Ids
from performer_lm.data.loader import BatchShare, RemainingIndices
from performer_lm.data.progress import say
from performer_lm.data.survey import digest_of
from performer_lm.data.tokenizer import Tokenizer

AT_ONCE: Final = 256  # documents encoded together


class Place(NamedTuple):
    """How far a stream was read: rows of an epoch."""

    epoch: int
    rows: int


@final
class DocumentStream:
    """The training documents of a set, epoch after epoch.

    Args:
        hub: the set.
        split: of the set.
        errors: of `Collection`.
        seed: of the order.
        shuffle_buffer: rows among which the next one is drawn; 1 keeps the set's order.
        held_out: digests of texts that are not trained on.
    """

    def __init__(
        self, hub: Hub, split: str, *, errors: Errors, seed: int, shuffle_buffer: int, held_out: frozenset[bytes]
    ) -> None:
        self._hub = hub
        self._split = split
        self._errors: Errors = errors
        self._seed = seed
        self._shuffle_buffer = shuffle_buffer
        self._held_out = held_out

    def read(self, start: Place) -> Iterator[tuple[bytes, Place]]:
        """Yield documents from a place on, each with the place after it; ValueError for a set that breaks off."""
        for epoch in count(start.epoch):
            data = self._hub.open(self._split, streaming=True)
            if self._shuffle_buffer > 1:
                (seed,) = np.random.SeedSequence([self._seed, epoch]).generate_state(1)
                data = data.shuffle(seed=int(seed), buffer_size=self._shuffle_buffer)
            skipped = start.rows if epoch == start.epoch else 0
            found = False
            for row, text in enumerate(self._hub.texts(data.skip(skipped) if skipped else data), skipped):
                text = clean(text, errors=self._errors, place=f"{self._hub.label} {self._split}")
                if text and digest_of(text) not in self._held_out:
                    found = True
                    yield text, Place(epoch, row + 1)
            if not (found or skipped):
                raise ValueError(f"{self._hub.label} has no document to train on in data.split={self._split}")


@final
class StreamBatches(Dataset[tuple[Tensor, Place]]):
    """The micro-batches of a run on one rank, each with the place that its step was read up to.

    They can be had one after another only, from any one on: the first takes up the stream at `start`. Every rank reads
    the whole stream and takes its own rows, so that any number of ranks sees the same batches.
    """

    def __init__(
        self, stream: DocumentStream, tokenizer: Tokenizer, share: BatchShare, *, context: int, steps: int
    ) -> None:
        self._stream = stream
        self._tokenizer = tokenizer
        self._share = share
        self._context = context
        self._steps = steps
        self._batches: Iterator[tuple[Tensor, Place]] | None = None
        self._next = 0
        self.start = Place(0, 0)

    def __len__(self) -> int:
        return self._steps * self._share.accumulation

    def __getitem__(self, index: int) -> tuple[Tensor, Place]:
        if self._batches is None or index == 0:
            self._batches, self._next = self._micro_batches(), index
        assert index == self._next, "a stream has no other order than its own"
        self._next += 1
        return next(self._batches)

    def _micro_batches(self) -> Iterator[tuple[Tensor, Place]]:
        starts = self._context * np.arange(self._share.batch_size)[:, None]
        for ids, place in self._cut(self._share.batch_size * self._context):
            rows = torch.from_numpy(ids[starts + np.arange(self._context + 1)])
            for part in range(self._share.accumulation):
                yield rows[self._share.rows(part)], place

    def _cut(self, length: int) -> Iterator[tuple[Ids, Place]]:
        """Yield `length + 1` ids at a time, each beginning with the last one before, and the place read up to."""
        held: Ids = np.array([self._tokenizer.end_id])
        for ids, place in self._encoded():
            held = np.concatenate((held, ids))
            while len(held) > length:
                yield held[: length + 1], place
                held = held[length:]

    def _encoded(self) -> Iterator[tuple[Ids, Place]]:
        """Yield the ids of some documents at a time, each closed by an end token."""
        end = np.array([self._tokenizer.end_id])
        texts: list[bytes] = []
        for text, place in self._stream.read(self.start):
            texts.append(text)
            if len(texts) >= AT_ONCE or sum(map(len, texts)) >= self._share.batch_size * self._context:
                encoded = self._tokenizer.encode_batch(texts)
                yield np.concatenate([part for ids in encoded for part in (ids, end)]), place
                texts = []


@final
class StreamLoader(DataLoader[Any]):
    """A loader that remembers the place its trainer's last step was read up to; `done` gives the trainer's count."""

    def __init__(self, batches: StreamBatches, *, done: Callable[[], int], accumulation: int, **options: Any) -> None:
        self._batches = batches
        self._numbers = RemainingIndices(batches)
        self._done = done
        self._accumulation = accumulation
        self._places: deque[tuple[int, Place]] = deque(maxlen=64)  # the trainer is few batches behind
        super().__init__(batches, batch_size=None, sampler=self._numbers, generator=torch.Generator(), **options)

    def __iter__(self) -> Any:
        for number, (rows, place) in enumerate(super().__iter__(), self._numbers.start + 1):
            self._places.append((number, Place(*place)))
            yield rows

    def state_dict(self) -> dict[str, Any]:
        done = self._done()
        place = dict(self._places).get(done, self._batches.start)
        return {"done": done, "accumulation": self._accumulation, "epoch": place.epoch, "rows": place.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._numbers.start = state["done"]
        self._batches.start = Place(state["epoch"], state["rows"])
        say(f"going on at row {state['rows']:,} of epoch {state['epoch']}: approximate resume, of a stream")
