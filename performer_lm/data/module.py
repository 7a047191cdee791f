"""The data of a run, as Lightning asks for it: corpus and tokenizer in, batches of windows out.

A run is one Lightning epoch of `max_steps` optimizer steps, so that its position is one number.
"""

from typing import Any, Literal, final

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from performer_lm.data.cache import TokenCache, open_cache
from performer_lm.data.corpus import Corpus
from performer_lm.data.ids import HostIds, Ids
from performer_lm.data.layouts import (
    DocumentLayout,
    HeldOutDocuments,
    HeldOutStream,
    Layout,
    StreamLayout,
    document_bounds,
)
from performer_lm.data.loader import Positions, Share, TrainBatches, TrainLoader, ValidationBatches
from performer_lm.data.tokenizer import Tokenizer, TokenizerRecipe
from performer_lm.data.windows import FiniteWindows, HeldOutWindows, TextWindows, Windows, count_first, first_bytes

Documents = Literal["stream", "packed", "cropped"]


@final
class TextData(lightning.LightningDataModule):
    """Text as batches `(b, context + 1)` of ids, `b` the sequences of one micro-batch; `windows.shift` cuts them.

    Args:
        corpus: where the text comes from.
        tokenizer: how the tokenizer comes from the training documents.
        context: tokens that a model sees at once.
        batch_size: sequences per optimizer step, over all ranks and accumulated micro-batches.
        documents: `stream` runs all documents into one, an end token between them; `packed` does so too, but a token
            sees its own document only (`separator`); `cropped` takes one window at the start of each document.
        validation_fraction: share of the documents held out.
        validation_bytes: bytes of held-out text that a run validates on; the whole of it is in `held_out_ids`.
        cache_dir: where tokenized corpora are kept.
        seed: of the order of the windows.
        num_workers: processes that gather windows; 0 gathers in the main one.
        path: the place that the corpus reads, so that messages can name it; None for a corpus that knows its own.

    After `prepare()`:
        tokenizer: the Tokenizer.
        train_ids, held_out_ids: flat id arrays `(n,)`.
        training: training's windows, without end.
        validation, held_out: windows that a run validates on, and all that were held out.
    """

    tokenizer: Tokenizer
    training: Windows
    validation: FiniteWindows
    held_out: FiniteWindows

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: TokenizerRecipe,
        context: int,
        batch_size: int,
        documents: Documents,
        validation_fraction: float,
        validation_bytes: int,
        cache_dir: str,
        seed: int,
        num_workers: int,
        path: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("context", context, 1),
            ("batch_size", batch_size, 1),
            ("validation_bytes", validation_bytes, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name} ({value}) must be at least {least}")
        self.context = context
        self.batch_size = batch_size
        self._documents = documents
        self._corpus = corpus
        self._recipe = tokenizer
        self._validation_fraction = validation_fraction
        self._validation_bytes = validation_bytes
        self._cache_dir = cache_dir
        self._seed = seed
        self._num_workers = num_workers
        self._source = path or "the corpus"
        self._cache: TokenCache | None = None

    def prepare(self) -> None:
        """Open the tokenized corpus, building it on first use, and check that it can fill windows.

        Raises:
            ValueError: in one line, for text that is missing, broken or too short.
        """
        if self._cache:
            return
        cache = open_cache(
            self._corpus,
            self._recipe,
            validation_fraction=self._validation_fraction,
            cache_dir=self._cache_dir,
        )
        if self._documents != "cropped" and len(cache.train) < self.context + 1:
            raise ValueError(
                f"{self._source} has {len(cache.train)} tokens for training; "
                f"one window needs {self.context + 1} (data.context={self.context})"
            )
        self.tokenizer = cache.tokenizer
        self.train_ids, self.held_out_ids = cache.train, cache.validation
        self.training = self._windows(cache.train)
        self.held_out = self._held_out(cache.validation)
        self.validation = self._first_held_out(cache.validation)
        self._cache = cache

    @property
    def separator(self) -> int | None:
        """The id at which tokens begin to see another document (`segments_of`), or None where they see all."""
        return self.tokenizer.end_id if self._documents == "packed" else None

    def _windows(self, ids: Ids) -> Windows:
        layout: Layout
        if self._documents == "cropped":
            bounds = document_bounds(ids, end_id=self.tokenizer.end_id)
            layout = DocumentLayout(bounds, seed=self._seed, context=self.context)
        else:
            layout = StreamLayout(len(ids), seed=self._seed, context=self.context)
        return TextWindows(HostIds(ids), layout, context=self.context)

    def _held_out(self, ids: Ids, *, documents: int | None = None) -> FiniteWindows:
        """Return all windows of held-out ids, or of the first `documents` of them."""
        if self._documents == "cropped":
            bounds = document_bounds(ids, end_id=self.tokenizer.end_id)[: None if documents is None else documents + 1]
            return HeldOutWindows(HostIds(ids), HeldOutDocuments(bounds, context=self.context), context=self.context)
        return HeldOutWindows(HostIds(ids), HeldOutStream(len(ids), context=self.context), context=self.context)

    def _first_held_out(self, ids: Ids) -> FiniteWindows:
        """Return the windows that a run validates on: about the first `validation_bytes` of what was held out."""
        lengths = self.tokenizer.byte_lengths()
        first = first_bytes(ids, lengths, limit=self._validation_bytes)
        if not lengths[first].any():
            raise ValueError(
                f"{self._source} has no token for validation (data.validation_fraction={self._validation_fraction}, "
                f"data.validation_bytes={self._validation_bytes}, {len(ids)} tokens held out)"
            )
        if self._documents == "cropped":
            count = count_first(self.held_out, lengths, limit=self._validation_bytes)
            return self._held_out(ids, documents=count)
        return self._held_out(first)

    def setup(self, stage: str) -> None:
        """Do what `prepare` does, for a trainer that was given data nobody prepared."""
        del stage
        self.prepare()

    def fingerprint(self) -> dict[str, Any]:
        """Return plain data that two runs share exactly when they see the same batches."""
        self.prepare()
        assert self._cache
        return {
            "corpus": self._cache.corpus_hash,
            "tokenizer": self._cache.tokenizer_hash,
            "validation_fraction": self._validation_fraction,
            "context": self.context,
            "batch_size": self.batch_size,
            "documents": self._documents,
            "seed": self._seed,
        }

    def share(self, trainer: lightning.Trainer) -> Share:
        """Return the part of every batch that this process of a trainer takes; no data need be prepared for it.

        Raises:
            ValueError: if the trainer has no `max_steps`, or the batch does not divide over ranks and accumulation.
        """
        if trainer.max_steps < 0:
            raise ValueError(f"trainer.max_steps ({trainer.max_steps}) must be at least 0: it is the length of a run")
        share = Share(
            batch_size=self.batch_size,
            accumulation=trainer.accumulate_grad_batches,
            ranks=trainer.world_size,
            rank=trainer.global_rank,
        )
        share.check()
        return share

    def train_dataloader(self) -> TrainLoader:
        """Return the micro-batches of a whole run on this rank."""
        trainer = self._fitting_trainer()
        share = self.share(trainer)
        batches = TrainBatches(self.training, share, steps=trainer.max_steps)
        return TrainLoader(
            batches,
            accumulation=share.accumulation,
            done=lambda: trainer.fit_loop.epoch_loop.batch_progress.current.state_dict()["processed"],
            num_workers=self._num_workers,
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the validation windows of this rank, in micro-batches of the size of training's."""
        share = self.share(self._fitting_trainer())
        batches = ValidationBatches(self.validation, share)
        return DataLoader(batches, batch_size=None, sampler=Positions(batches), generator=torch.Generator())

    def _fitting_trainer(self) -> lightning.Trainer:
        assert self.trainer, "batches are cut for a trainer: pass this module to one"
        return self.trainer
