"""Text as data: corpora through a tokenizer to flat ids on disk, and windows onto them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Unpack, final

import numpy as np
from annotated_types import Ge, Le

from performer_lm.data.cache import TokenCache, open_cache
from performer_lm.data.corpora.base import Corpus
from performer_lm.data.corpora.collection import Collection, Errors
from performer_lm.data.held_out import HeldOut
from performer_lm.data.ids import HostIds, Spans
from performer_lm.data.layouts import (
    DocumentLayout,
    MixtureLayout,
    ShuffledLayout,
    StreamLayout,
    document_bounds,
    document_spans,
    shares,
    stream_spans,
)
from performer_lm.data.module import AnyWindows, WindowData, WindowOptions
from performer_lm.data.progress import say
from performer_lm.data.tokenizer import TokenizerRecipe
from performer_lm.data.windows import ByteLengths, FiniteWindows, TextWindows, count_first, first_bytes, listed_windows
from performer_lm.ranges import Count, ranged

Documents = Literal["stream", "packed", "cropped"]
Threads = Annotated[int, Ge(1), Le(1024)]


class TextOptions(WindowOptions):
    """Options of all text data; `TextData` explains them."""

    tokenizer: TokenizerRecipe
    documents: Documents
    errors: Errors
    validation_fraction: HeldOut
    validation_bytes: Count
    cache_dir: str
    tokenizing_threads: Threads | None
    device_resident: bool


@ranged
@final
class TextData(WindowData):
    """Documents of one corpus, or of several mixed by weight.

    Args:
        corpora: where the text comes from, by name.
        weights: of the corpora: shares of the windows of every batch, in any unit; None for as many windows as each
            corpus has.
        tokenizer: how the tokenizer comes from the training documents.
        documents: `stream` runs all documents into one, an end token between them; `packed` does so too, but a token
            sees its own document only (`separator`); `cropped` takes one window at the start of each document.
        errors: what becomes of a document that is not UTF-8: `strict`, `replace`, `skip` or `bytes`.
        validation_fraction: share of the documents held out, of each corpus.
        validation_bytes: bytes of held-out text that a run validates on; the whole of it is in `held_out`.
        cache_dir: where tokenized corpora are kept.
        tokenizing_threads: None for one a core.
        device_resident: whether the ids are copied to the device that trains, and windows gathered there.
        options: of `WindowData`.
    """

    def __init__(
        self,
        *,
        corpora: Mapping[str, Corpus],
        weights: Mapping[str, float] | None,
        tokenizer: TokenizerRecipe,
        documents: Documents,
        errors: Errors,
        validation_fraction: HeldOut,
        validation_bytes: Count,
        cache_dir: str,
        tokenizing_threads: Threads | None,
        device_resident: bool,
        **options: Unpack[WindowOptions],
    ) -> None:
        super().__init__(**options)
        if device_resident and options["num_workers"]:
            raise ValueError(f"data.num_workers ({options['num_workers']}) must be 0 with data.device_resident=true")
        self._collection = Collection(corpora, errors=errors)
        self._weights = _check_weights(list(corpora), weights)
        self._recipe = tokenizer
        self._documents = documents
        self._validation_fraction = validation_fraction
        self._validation_bytes = validation_bytes
        self._cache_dir = cache_dir
        self._tokenizing_threads = tokenizing_threads
        self._device_resident = device_resident
        self._cache: TokenCache | None = None

    def prepare(self) -> None:
        if self._cache:
            return
        cache = self._open(self._validation_fraction)
        self.training = self._lay_out(cache)
        self.validation = self._first_held_out(cache)
        self._cache = cache

    def prepare_held_out(self, *, whole: bool) -> None:
        self._cache = self._open(None if whole else self._validation_fraction)

    def _open(self, fraction: float | None) -> TokenCache:
        cache = open_cache(
            self._collection,
            self._recipe,
            validation_fraction=fraction,
            cache_dir=self._cache_dir,
            threads=self._tokenizing_threads,
        )
        self.tokenizer = cache.tokenizer
        self.train_ids, self.held_out_ids = cache.train, cache.validation
        self._bounds = (
            document_bounds(cache.validation, end_id=cache.tokenizer.end_id)
            if self._documents == "cropped" or not cache.is_exact
            else np.empty(0, dtype=np.int64)
        )
        self.held_out = self._all_held_out(cache)
        if not cache.is_exact:
            say("the tokenizer does not give the text back byte for byte: val/bpb counts the text's own bytes")
        return cache

    def fingerprint(self) -> dict[str, Any]:
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
            **({"weights": list(self._weights)} if self._weights else {}),
        }

    @property
    def is_packed(self) -> bool:
        return self._documents == "packed"

    def where_gathered(self, windows: AnyWindows) -> AnyWindows:
        return windows.to(self.device) if self._device_resident else windows

    def _lay_out(self, cache: TokenCache) -> TextWindows:
        layouts = [
            self._corpus_layout(cache, corpus, first, stop)
            for corpus, (first, stop) in zip(
                self._collection.corpora.values(), pairwise(cache.train_bounds), strict=True
            )
        ]
        if len(layouts) == 1:
            return TextWindows(HostIds(cache.train), layouts[0], context=self.context)
        weights = self._weights or [layout.per_epoch for layout in layouts]
        mixture = MixtureLayout(layouts, weights, seed=self._seed)
        return TextWindows(HostIds(cache.train), mixture, context=self.context)

    def _corpus_layout(self, cache: TokenCache, corpus: Corpus, first: int, stop: int) -> ShuffledLayout:
        """Return the windows of one corpus, whose ids go from one end token to another."""
        if self._documents == "cropped":
            bounds = first + document_bounds(cache.train[first : stop + 1], end_id=self.tokenizer.end_id)
            return DocumentLayout(bounds, seed=self._seed, context=self.context)
        num_ids = stop + 1 - first
        if num_ids < self.context + 1:
            raise ValueError(
                f"{corpus.label} has {num_ids} tokens for training; "
                f"one window needs {self.context + 1} (data.context={self.context})"
            )
        return StreamLayout(num_ids, seed=self._seed, context=self.context, first=first)

    def _all_held_out(self, cache: TokenCache) -> FiniteWindows:
        if self._documents == "cropped":
            spans = document_spans(self._bounds, context=self.context)
        else:
            spans = stream_spans(len(cache.validation), context=self.context)
        return self._held_out_windows(cache, [spans], [(0, len(cache.validation) - 1)])

    def _first_held_out(self, cache: TokenCache) -> FiniteWindows:
        """Return the windows that a run validates on: about `validation_bytes`, shared out among the corpora."""
        parts: list[Spans] = []
        ranges = []
        weights = self._weights or np.maximum(np.diff(cache.train_bounds), 1).tolist()
        limits = [self._validation_bytes * weight / sum(weights) for weight in weights]
        corpora = self._collection.corpora.values()
        for corpus, limit, (first, stop) in zip(corpora, limits, pairwise(cache.validation_bounds), strict=True):
            if stop > first:  # else all that was held out of it stands in training too
                if (cache.validation[first : stop + 1] == cache.tokenizer.end_id).all():
                    raise self._nothing_held_out(corpus.label, stop + 1 - first)
                spans, end = self._first_of(cache, first, stop, limit=max(int(limit), 1))
                parts.append(spans)
                ranges.append((first, end))
        windows = self._held_out_windows(cache, parts, ranges)
        lengths = cache.tokenizer.byte_lengths()
        if not any(lengths[cache.validation[first : end + 1]].any() for first, end in ranges):
            raise self._nothing_held_out(self._collection.label, len(cache.validation))
        return windows

    def _nothing_held_out(self, label: str, num_tokens: int) -> ValueError:
        return ValueError(
            f"{label} has no token for validation (data.validation_fraction={self._validation_fraction}, "
            f"data.validation_bytes={self._validation_bytes}, {num_tokens} tokens held out)"
        )

    def _first_of(self, cache: TokenCache, first: int, stop: int, *, limit: int) -> tuple[Spans, int]:
        """Return the first windows of a corpus's held-out ids, and the place of the last id they reach."""
        ids = cache.validation[first : stop + 1]
        if self._documents == "cropped":
            bounds = self._bounds[(self._bounds >= first) & (self._bounds <= stop)]
            windows = self._held_out_windows(cache, [document_spans(bounds, context=self.context)], [(first, stop)])
            bounds = bounds[: count_first(windows, limit=limit) + 1]
            return document_spans(bounds, context=self.context), int(bounds[-1])
        if cache.is_exact:
            num_ids = len(first_bytes(ids, cache.tokenizer.byte_lengths(), limit=limit))
        else:  # whole documents, whose bytes of text are known
            documents = np.searchsorted(self._bounds, [first, stop])
            sizes = np.cumsum(cache.validation_sizes[documents[0] : documents[1]])
            count = max(int(np.searchsorted(sizes, limit, side="right")), 1)
            num_ids = int(self._bounds[documents[0] + count]) + 1 - first
        return stream_spans(num_ids, context=self.context, first=first), first + num_ids - 1

    def _held_out_windows(
        self, cache: TokenCache, spans: Sequence[Spans], ranges: Sequence[tuple[int, int]]
    ) -> FiniteWindows:
        lengths = self._byte_lengths(cache, ranges)
        return listed_windows(HostIds(cache.validation), *spans, context=self.context, byte_lengths=lengths)

    def _byte_lengths(self, cache: TokenCache, ranges: Sequence[tuple[int, int]]) -> ByteLengths:
        """Return the bytes of text of each id; where the tokenizer is not exact, the average over all ids.

        Args:
            cache: what was tokenized.
            ranges: first and last position, end tokens both, of the held-out ids to take the average of.
        """
        if cache.is_exact:
            return cache.tokenizer.byte_lengths()
        text = tokens = 0
        for first, last in ranges:
            documents = np.searchsorted(self._bounds, [first, last])
            text += int(cache.validation_sizes[documents[0] : documents[1]].sum())
            tokens += last - first - int(documents[1] - documents[0])
        return cache.tokenizer.equal_lengths(text / max(tokens, 1))


def _check_weights(names: Sequence[str], weights: Mapping[str, float] | None) -> list[float] | None:
    """Return the weights in the order of the corpora; ValueError if they do not name the corpora, or are not shares."""
    if weights is None:
        return None
    if set(weights) != set(names):
        raise ValueError(f"data.weights ({', '.join(weights)}) must name the corpora ({', '.join(names)})")
    ordered = [weights[name] for name in names]
    shares(ordered)
    return ordered
