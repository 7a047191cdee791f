"""Corpus and tokenizer to two flat id arrays on disk, built once, accepted whole or not at all.

A cache lies in a folder named by everything it depends on: the text, the tokenizer's options, the split, the format.
It is built beside its final name under a lock and renamed when it is complete, so a build that is killed leaves
nothing that could be taken for a cache. An array reads `end, document, end, document, ..., end`: each document starts
after an end token and closes with one, so that, given the first id, every byte of text is predicted once.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from performer_lm.data.corpus import Corpus, split_names, split_text
from performer_lm.data.tokenizer import Tokenizer, TokenizerRecipe, tokenizer_from_dict

FORMAT: Final = 1
BATCH_BYTES: Final = 1 << 22  # text encoded in one go; the ids of a batch are all that is held in memory
MANIFEST: Final = "manifest.json"
SIDES: Final = ("train", "validation")


class TokenCache(NamedTuple):
    """A tokenized corpus: memory-mapped ids `(n,)` of each side, and hashes that name what they were made of."""

    tokenizer: Tokenizer
    train: NDArray[np.unsignedinteger]
    validation: NDArray[np.unsignedinteger]
    corpus_hash: str
    tokenizer_hash: str


class Survey(NamedTuple):
    """What one reading of a corpus tells: bytes by name, in order, and a hash of every name and byte."""

    sizes: dict[str, int]
    content_hash: str


def open_cache(corpus: Corpus, recipe: TokenizerRecipe, *, validation_fraction: float, cache_dir: str) -> TokenCache:
    """Open the cache of a corpus, building it first if there is none. Other processes wait, then open the same one.

    Args:
        corpus: read once to know it; a build reads it several times more, never holding all of it.
        recipe: of the tokenizer; built from the training documents only.
        validation_fraction: share of the documents held out (`split_names`); of a single document, its last part.
        cache_dir: where caches live; relative to the working directory.

    Raises:
        ValueError: in one line, for text that cannot be read or split, or a cache that cannot be written.
    """
    survey = read_through(corpus)
    key = _digest(
        {
            "format": FORMAT,
            "content": survey.content_hash,
            "tokenizer": recipe.key(),
            "validation_fraction": validation_fraction,
        }
    )
    folder = Path(cache_dir) / key[:24]
    cache = _read(folder)
    if cache:
        return cache
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (cache := _read(folder)):
                _build(folder, corpus, survey, recipe, validation_fraction)
                cache = _read(folder)
    except OSError as error:
        raise ValueError(f"data.cache_dir={cache_dir} cannot be written: {error.strerror or error}") from error
    assert cache, f"{folder} was built but does not open"
    return cache


def read_through(corpus: Corpus) -> Survey:
    """Read a corpus once."""
    sizes, content = {}, sha256()
    for name, text in corpus.documents():
        sizes[name] = len(text)
        encoded = name.encode("utf-8", errors="surrogateescape")
        content.update(f"{len(encoded)} {len(text)} ".encode() + encoded)
        content.update(text)
    return Survey(sizes, content.hexdigest())


def _build(folder: Path, corpus: Corpus, survey: Survey, recipe: TokenizerRecipe, validation_fraction: float) -> None:
    """Write a complete cache to `folder`, replacing a broken one."""
    partial = folder.with_name(f"{folder.name}.partial")  # alone under the lock: what lies there was left by a kill
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    sides = _Sides(corpus, survey, validation_fraction)
    progress = _Progress(sum(survey.sizes.values()))
    progress.show("data: building the tokenizer")
    tokenizer = recipe.build(_Training(sides), num_bytes=sum(map(len, sides.train())))
    dtype = np.min_scalar_type(tokenizer.end_id)
    counts = {
        side: _write_ids(partial / f"{side}.bin", texts, tokenizer, dtype, progress)
        for side, texts in (("train", sides.train()), ("validation", sides.validation()))
    }
    if read_through(corpus).content_hash != survey.content_hash:
        raise ValueError("the corpus changed while it was tokenized; start again once it is still")
    manifest = {
        "format": FORMAT,
        "corpus": survey.content_hash,
        "dtype": dtype.name,
        "ids": counts,
        "tokenizer": tokenizer.to_dict(),
    }
    _write_synced(partial / MANIFEST, [json.dumps(manifest).encode()])
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    progress.finish(counts)


def _read(folder: Path) -> TokenCache | None:
    """Open a cache if it is there and whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        dtype, tokenizer = np.dtype(manifest["dtype"]), tokenizer_from_dict(manifest["tokenizer"])
        for side in SIDES:
            if (folder / f"{side}.bin").stat().st_size != manifest["ids"][side] * dtype.itemsize:
                return None
        train, validation = (np.memmap(folder / f"{side}.bin", dtype=dtype, mode="r") for side in SIDES)
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not what `_build` writes
        return None
    return TokenCache(tokenizer, train, validation, manifest["corpus"], _digest(manifest["tokenizer"]))


class _Sides:
    """The texts of a corpus on each side of the split, read again whenever they are asked for."""

    def __init__(self, corpus: Corpus, survey: Survey, fraction: float) -> None:
        self._corpus = corpus
        self._fraction = fraction
        self._validation = None if len(survey.sizes) == 1 else split_names(survey.sizes, fraction=fraction).validation

    def train(self) -> Iterator[bytes]:
        if self._validation is None:
            yield self._cut()[0]
        else:
            held_out = set(self._validation)
            yield from (text for name, text in self._corpus.documents() if name not in held_out)

    def validation(self) -> Iterator[bytes]:
        if self._validation is None:
            yield self._cut()[1]
        else:
            held_out = set(self._validation)
            texts = {name: text for name, text in self._corpus.documents() if name in held_out}
            yield from (texts[name] for name in self._validation)

    def _cut(self) -> tuple[bytes, bytes]:
        (document,) = self._corpus.documents()
        return split_text(document.text, fraction=self._fraction)


class _Training:
    """The training documents, to be gone through any number of times."""

    def __init__(self, sides: _Sides) -> None:
        self._sides = sides

    def __iter__(self) -> Iterator[bytes]:
        return self._sides.train()


class _Progress:
    """One line on stderr: rewritten on a terminal, written once at the end elsewhere."""

    def __init__(self, num_bytes: int) -> None:
        self._total = num_bytes
        self._done = 0
        self._start = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self.show(f"data: tokenizing {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB")

    def show(self, line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def finish(self, counts: dict[str, int]) -> None:
        seconds = time.monotonic() - self._start
        sizes = " + ".join(f"{counts[side]:,} {side}" for side in SIDES)
        self.show("")
        print(f"data: {self._total / 1e6:.1f} MB of text in {seconds:.1f} s: {sizes} tokens", file=sys.stderr)


def _write_ids(
    path: Path, texts: Iterable[bytes], tokenizer: Tokenizer, dtype: np.dtype[Any], progress: _Progress
) -> int:
    """Write the ids of texts, an end token before the first and after each; return how many."""
    end = np.array([tokenizer.end_id], dtype=dtype)
    num_ids = 1

    def chunks() -> Iterator[bytes]:
        nonlocal num_ids
        yield end.tobytes()
        for batch in _batches(texts):
            for ids in tokenizer.encode_batch(batch):
                num_ids += len(ids) + 1
                yield ids.astype(dtype).tobytes() + end.tobytes()
            progress.add(sum(map(len, batch)))

    _write_synced(path, chunks())
    return num_ids


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Gather texts into lists of about `BATCH_BYTES`."""
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_synced(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that is on the disk when this returns: a rename may not overtake it."""
    with path.open("wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def _digest(plain: dict[str, Any]) -> str:
    return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
