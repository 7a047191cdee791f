"""Data sets that are too large to keep, read from the hub while a run goes on: nothing of them is stored.

Documents come in the set's own order, shuffled within a buffer; windows are cut from them as they come. What a run
sees is a function of its seed as long as the set stays as it is, but the place to go on from is not one number: a
resumed run loses the rest of a document and goes on with the next one.
"""

from collections import deque
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import count
from typing import Any, Final, NamedTuple, Unpack, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from performer_lm.data.corpora.collection import Errors, clean
from performer_lm.data.corpora.hub import Hub
from performer_lm.data.ids import HostIds, Ids
from performer_lm.data.layouts import HeldOutStream
from performer_lm.data.loader import Positions, Share
from performer_lm.data.module import WindowData, WindowOptions, check_least
from performer_lm.data.progress import say
from performer_lm.data.split import check_fraction
from performer_lm.data.survey import digest_of, place_of
from performer_lm.data.tokenizer import Tokenizer, TokenizerRecipe
from performer_lm.data.windows import HeldOutWindows

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
        split: of it.
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
        """Yield documents from a place on, each with the place after it.

        Raises:
            ValueError: for a set without a document to train on, or one that breaks off.
        """
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

    def __init__(self, stream: DocumentStream, tokenizer: Tokenizer, share: Share, *, context: int, steps: int) -> None:
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
    """A loader that remembers the place its trainer's last step was read up to.

    Args:
        batches: what to load.
        done: gives the trainer's count of micro-batches.
        accumulation: micro-batches per step.
        options: of DataLoader.
    """

    def __init__(self, batches: StreamBatches, *, done: Callable[[], int], accumulation: int, **options: Any) -> None:
        self._batches = batches
        self._numbers = Positions(batches)
        self._done = done
        self._accumulation = accumulation
        self._places: deque[tuple[int, Place]] = deque(maxlen=64)  # the trainer is few batches behind
        super().__init__(batches, batch_size=None, sampler=self._numbers, generator=torch.Generator(), **options)

    def __iter__(self) -> Any:
        for number, (rows, place) in enumerate(super().__iter__(), self._numbers.start + 1):
            self._places.append((number, Place(*place)))
            yield rows

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain data."""
        done = self._done()
        place = dict(self._places).get(done, self._batches.start)
        return {"done": done, "accumulation": self._accumulation, "epoch": place.epoch, "rows": place.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on about where the position says."""
        self._numbers.start = state["done"]
        self._batches.start = Place(state["epoch"], state["rows"])
        say(f"going on at row {state['rows']:,} of epoch {state['epoch']}: approximate resume, of a stream")


@final
class StreamData(WindowData):
    """A data set of the hub, read while the run goes on.

    Args:
        hub: the set; its validation split, where it has one, is read until `validation_bytes`.
        tokenizer: how the tokenizer comes from the head of the stream.
        head_bytes: text read ahead, for the tokenizer and, without a validation split, to validate on.
        shuffle_buffer: rows among which the next one is drawn.
        packed: whether a token sees its own document only.
        errors: of `Collection`.
        validation_fraction: share of the head's documents held out.
        validation_bytes: bytes of held-out text that a run validates on.
        options: of `WindowData`.
    """

    def __init__(
        self,
        *,
        hub: Hub,
        tokenizer: TokenizerRecipe,
        head_bytes: int,
        shuffle_buffer: int,
        packed: bool,
        errors: Errors,
        validation_fraction: float,
        validation_bytes: int,
        **options: Unpack[WindowOptions],
    ) -> None:
        super().__init__(**options)
        check_fraction(validation_fraction)
        check_least(1, validation_bytes=validation_bytes, head_bytes=head_bytes, shuffle_buffer=shuffle_buffer)
        if options["num_workers"] > 1:
            raise ValueError(f"data.num_workers ({options['num_workers']}) must be 0 or 1 with data.streaming=true")
        self._hub = hub
        self._recipe = tokenizer
        self._head_bytes = head_bytes
        self._shuffle_buffer = shuffle_buffer
        self._packed = packed
        self._errors: Errors = errors
        self._validation_fraction = validation_fraction
        self._validation_bytes = validation_bytes
        self._stream: DocumentStream | None = None

    def prepare(self) -> None:
        """Read the head of the stream, make the tokenizer from it and set aside what to validate on."""
        if self._stream:
            return
        say("streaming: a resumed run goes on about where it stopped (approximate resume)")
        head, held_out = self._read_head()
        self.tokenizer = self._recipe.build(head, num_bytes=sum(map(len, head)))
        self._head_hash = sha256(b"".join(map(digest_of, [*head, *held_out]))).hexdigest()
        self.validation = self.held_out = self._lay_out(held_out)
        self._stream = DocumentStream(
            self._hub,
            self._hub.split,
            errors=self._errors,
            seed=self._seed,
            shuffle_buffer=self._shuffle_buffer,
            held_out=frozenset(map(digest_of, held_out)),
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return what is known of a set that is not read whole."""
        self.prepare()
        plain = repr(sorted(self.tokenizer.to_dict().items()))
        return {
            "stream": self._hub.label,
            "head": self._head_hash,
            "tokenizer": sha256(plain.encode()).hexdigest(),
            "shuffle_buffer": self._shuffle_buffer,
            "context": self.context,
            "batch_size": self.batch_size,
            "packed": self._packed,
            "seed": self._seed,
        }

    @property
    def is_packed(self) -> bool:
        """Whether `packed` says so."""
        return self._packed

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the micro-batches of a whole run on this rank."""
        assert self._stream
        trainer = self.fitting_trainer()
        share = self.share(trainer)
        batches = StreamBatches(self._stream, self.tokenizer, share, context=self.context, steps=trainer.max_steps)
        return StreamLoader(
            batches,
            done=lambda: trainer.fit_loop.epoch_loop.batch_progress.current.ready,
            accumulation=share.accumulation,
            num_workers=self._num_workers,
            multiprocessing_context=self._start_method if self._num_workers else None,
            pin_memory=self.pins_memory,
        )

    def _read_head(self) -> tuple[list[bytes], list[bytes]]:
        """Return the head's documents to learn from and those to validate on, no text on both sides."""
        head: dict[bytes, bytes] = {}
        held_out: dict[bytes, bytes] = {}
        sizes = [0, 0]
        for split, given in self._hub.splits:
            texts = self._hub.texts(self._hub.open(split, streaming=True))
            for row, text in enumerate(texts):
                place = f"{split}#{row}"
                text = clean(text, errors=self._errors, place=f"{self._hub.label} {place}")
                aside = given if given is not None else place_of(place) < self._validation_fraction or not held_out
                side, size = (held_out, 1) if aside else (head, 0)
                if text and (not aside or sizes[1] < self._validation_bytes) and digest_of(text) not in head:
                    side[digest_of(text)] = text
                    sizes[size] += len(text)
                if sizes[1] >= self._validation_bytes if given else sizes[0] >= self._head_bytes:
                    break
        train = [text for digest, text in head.items() if digest not in held_out]
        if not (train and held_out):
            raise ValueError(
                f"{self._hub.label} has {len(train)} documents to train on and {len(held_out)} to validate on in the "
                f"first {self._head_bytes} bytes (data.head_bytes)"
            )
        return train, list(held_out.values())

    def _lay_out(self, texts: list[bytes]) -> HeldOutWindows:
        encoded = self.tokenizer.encode_batch(texts)
        end = np.array([self.tokenizer.end_id])
        ids = np.concatenate([end, *(part for each in encoded for part in (each, end))])
        lengths: Any = self.tokenizer.byte_lengths()
        size = sum(map(len, texts))
        if int(lengths[ids].sum()) != size:
            lengths = np.full(self.tokenizer.vocab_size, size / max(len(ids) - len(texts) - 1, 1), dtype=np.float32)
            lengths[self.tokenizer.end_id :] = 0
        layout = HeldOutStream(len(ids), context=self.context)
        return HeldOutWindows(HostIds(ids), layout, context=self.context, byte_lengths=lengths)
