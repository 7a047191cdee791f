"""A data set that is too large to keep, read from the hub while a run goes on.

Documents come in the set's own order, shuffled within a buffer; windows are cut from them as they come. What a run
sees is a function of its seed as long as the set stays as it is, but the place to go on from is not one number: a
resumed run loses the rest of a document and goes on with the next one.
"""

from hashlib import sha256
from typing import Any, Unpack, final

import numpy as np
from torch.utils.data import DataLoader

from performer_lm.data.corpora.collection import Errors, clean
from performer_lm.data.corpora.hub import Hub
from performer_lm.data.held_out import HeldOut
from performer_lm.data.ids import HostIds
from performer_lm.data.layouts import stream_spans
from performer_lm.data.module import WindowData, WindowOptions
from performer_lm.data.progress import say
from performer_lm.data.streaming.batches import DocumentStream, StreamBatches, StreamLoader
from performer_lm.data.survey import digest_of, place_of
from performer_lm.data.tokenizer import TokenizerRecipe
from performer_lm.data.windows import FiniteWindows, listed_windows
from performer_lm.ranges import Count, ranged


@ranged
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
        head_bytes: Count,
        shuffle_buffer: Count,
        packed: bool,
        errors: Errors,
        validation_fraction: HeldOut,
        validation_bytes: Count,
        **options: Unpack[WindowOptions],
    ) -> None:
        super().__init__(**options)
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

    def prepare_held_out(self, *, whole: bool) -> None:
        if whole:
            raise ValueError("data.streaming=true keeps no text to measure; data.streaming=false reads the whole split")
        self.prepare()

    def fingerprint(self) -> dict[str, Any]:
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
        return self._packed

    def train_dataloader(self) -> DataLoader[Any]:
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

    def _lay_out(self, texts: list[bytes]) -> FiniteWindows:
        encoded = self.tokenizer.encode_batch(texts)
        end = np.array([self.tokenizer.end_id])
        ids = np.concatenate([end, *(part for each in encoded for part in (each, end))])
        lengths: Any = self.tokenizer.byte_lengths()
        size = sum(map(len, texts))
        if int(lengths[ids].sum()) != size:
            lengths = self.tokenizer.equal_lengths(size / max(len(ids) - len(texts) - 1, 1))
        spans = stream_spans(len(ids), context=self.context)
        return listed_windows(HostIds(ids), spans, context=self.context, byte_lengths=lengths)
