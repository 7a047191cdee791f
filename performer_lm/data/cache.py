"""Corpora and a tokenizer to two flat id arrays on disk, built once, accepted whole or not at all.

A cache lies in a folder named by everything it depends on: the texts, the tokenizer, the split, the format. It is
built beside its final name under a lock and renamed when it is complete, so a build that is killed leaves nothing that
could be taken for a cache. Tokenizers that were trained are kept beside the arrays, under a key of the texts and of
their recipe.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from performer_lm.data.build import pieces, sync, write_arrays
from performer_lm.data.corpora.collection import Collection
from performer_lm.data.held_out import Split, hold_out_all, split_documents
from performer_lm.data.ids import Ids
from performer_lm.data.progress import PreparationProgress, say
from performer_lm.data.reading import check_regular
from performer_lm.data.survey import Survey, read_through
from performer_lm.data.tokenizer import Tokenizer, TokenizerRecipe, tokenizer_from_dict

FORMAT: Final = 2
MANIFEST: Final = "manifest.json"
CHECKSUM: Final = "sha256"


class TokenCache(NamedTuple):
    """A tokenized collection: memory-mapped ids `(n,)` of each side, and hashes of text and tokenizer."""

    tokenizer: Tokenizer
    train: Ids
    validation: Ids
    train_bounds: list[int]
    """Indices of the end tokens between corpora, one more than there are corpora."""
    validation_bounds: list[int]
    validation_sizes: NDArray[np.int64]
    """Bytes of text of each held-out document."""
    is_exact: bool
    """Whether the tokenizer gives back every document byte for byte."""
    corpus_hash: str
    tokenizer_hash: str


class _Source(NamedTuple):
    collection: Collection
    survey: Survey
    split: Split
    fraction: float | None


def open_cache(
    collection: Collection,
    recipe: TokenizerRecipe,
    *,
    validation_fraction: float | None,
    cache_dir: str,
    threads: int | None = None,
) -> TokenCache:
    """Open the cache of a collection, building it first if there is none. Other processes wait, then open the same.

    Args:
        collection: read once to know it; building reads it once more, and training a tokenizer does, too.
        recipe: of the tokenizer; built from the training documents only.
        validation_fraction: share of the documents held out (`split_documents`); None holds out all.
        cache_dir: folder of all caches.
        threads: that tokenize; None for as many as torch uses, one a core.

    Raises:
        ValueError: in one line, for text that cannot be read or split, or a cache that cannot be written.
    """
    with PreparationProgress() as progress:
        progress.begin("reading")
        survey = read_through(collection)
        fraction = validation_fraction
        split = hold_out_all(survey) if fraction is None else split_documents(survey, fraction=fraction)
        source = _Source(collection, survey, split, fraction)
        try:
            tokenizer = _open_tokenizer(source, recipe, Path(cache_dir), progress)
            plain = tokenizer.to_dict()
            key = {"format": FORMAT, "content": survey.content_hash, "fraction": fraction, "ids": plain}
            folder = Path(cache_dir) / _digest(key)[:24]
            return _open_or_build(
                folder,
                lambda: _read(folder, tokenizer, survey.content_hash),
                lambda: _build(folder, source, tokenizer, threads or torch.get_num_threads(), progress),
            )
        except OSError as error:
            raise ValueError(f"data.cache_dir={cache_dir} cannot be written: {error.strerror or error}") from error


def _open_or_build(path: Path, read: Callable[[], Any], build: Callable[[], None]) -> Any:
    """Return the content of `path`, built under a lock if it is not there or not whole."""
    if (found := read()) is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if (found := read()) is None:
            build()
            found = read()
    assert found is not None, f"{path} was built but does not open"
    return found


class _TrainingTexts:
    """The training documents, to be gone through any number of times."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def __iter__(self) -> Iterator[bytes]:
        collection, survey, split, fraction = self._source
        return (piece.text for piece in pieces(collection, survey, split, fraction=fraction) if not piece.held_out)


def _open_tokenizer(
    source: _Source, recipe: TokenizerRecipe, cache_dir: Path, progress: PreparationProgress
) -> Tokenizer:
    """Return the tokenizer of a recipe, trained once for the same texts."""
    num_bytes = int(source.survey.sizes.sum())

    def build() -> Tokenizer:
        progress.begin("building the tokenizer")
        return recipe.build(_TrainingTexts(source), num_bytes=num_bytes)

    if not recipe.learns:
        return build()
    key = {"format": FORMAT, "content": source.survey.content_hash, "fraction": source.fraction, **recipe.key()}
    path = cache_dir / "tokenizers" / f"{_digest(key)[:24]}.json"
    tokenizer: Tokenizer = _open_or_build(path, lambda: _read_tokenizer(path), lambda: _write_tokenizer(path, build()))
    return tokenizer


def _read_tokenizer(path: Path) -> Tokenizer | None:
    try:
        check_regular(path)
        kept = json.loads(path.read_bytes())
        return tokenizer_from_dict(kept["tokenizer"]) if _digest(kept["tokenizer"]) == kept[CHECKSUM] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not what `_write_tokenizer` writes
        return None


def _write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    partial, plain = path.with_suffix(".partial"), tokenizer.to_dict()
    with partial.open("wb") as file:
        file.write(json.dumps({"tokenizer": plain, CHECKSUM: _digest(plain)}).encode())
        sync(file)
    partial.replace(path)


def _build(folder: Path, source: _Source, tokenizer: Tokenizer, threads: int, progress: PreparationProgress) -> None:
    """Write a complete cache to `folder`, replacing a broken one."""
    partial = folder.with_name(f"{folder.name}.partial")  # alone under the lock: what lies there was left by a kill
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    collection, survey, split, fraction = source
    start, num_bytes = time.monotonic(), int(survey.sizes.sum())
    progress.begin("tokenizing", num_bytes=num_bytes)
    dtype = _dtype_of(tokenizer)
    texts = pieces(collection, survey, split, fraction=fraction)
    built = write_arrays(
        partial, texts, tokenizer, collection=collection, dtype=dtype, threads=threads, progress=progress
    )
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": dtype.name,
        "train": built.train_bounds,
        "validation": built.held_out_bounds,
        "documents": built.num_documents,
        "inexact": built.num_inexact,
    }
    manifest[CHECKSUM] = _checksum(manifest, *_map_all(partial, manifest))
    with (partial / MANIFEST).open("wb") as file:
        file.write(json.dumps(manifest).encode())
        sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    train, held_out = (f"{bounds[-1] + 1:,}" for bounds in (built.train_bounds, built.held_out_bounds))
    tokens = f"{held_out} tokens" if fraction is None else f"{train} train + {held_out} validation tokens"
    say(f"{num_bytes / 1e6:.1f} MB of text in {time.monotonic() - start:.1f} s: {tokens}")
    if split.num_moved:
        say(f"{split.num_moved:,} documents were not held out, for their text also stands in training")


def _read(folder: Path, tokenizer: Tokenizer, content_hash: str) -> TokenCache | None:
    """Open a cache if it is there and whole."""
    try:
        check_regular(folder / MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        arrays = train, validation, sizes = _map_all(folder, manifest)
        is_whole = manifest.pop(CHECKSUM) == _checksum(manifest, *arrays)
        bounds, exact = (manifest["train"], manifest["validation"]), manifest["inexact"] == 0
        is_sound = all(each == sorted(each) and each[0] == 0 for each in bounds)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):  # not what `_build` writes
        return None
    is_sound = is_sound and train.dtype == _dtype_of(tokenizer)
    if not (is_whole and is_sound and max(train.max(), validation.max()) < tokenizer.vocab_size):
        return None
    return TokenCache(tokenizer, train, validation, *bounds, sizes, exact, content_hash, _digest(tokenizer.to_dict()))


def _dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.min_scalar_type(max(tokenizer.end_id, tokenizer.num_pieces - 1))


def _map_all(folder: Path, manifest: dict[str, Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return training ids, held-out ids and the sizes of held-out documents."""
    dtype = np.dtype(manifest["dtype"])
    return (
        _map(folder / "train.bin", dtype, manifest["train"][-1] + 1),
        _map(folder / "validation.bin", dtype, manifest["validation"][-1] + 1),
        _map(folder / "validation_sizes.bin", np.dtype(np.int64), manifest["documents"][1]),
    )


def _map(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    check_regular(path)
    if path.stat().st_size != length * dtype.itemsize:
        raise ValueError(f"{path} is not whole")
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,)) if length else np.empty(0, dtype=dtype)


def _checksum(manifest: dict[str, Any], *arrays: NDArray[Any]) -> str:
    """Return a hash of all that a cache holds."""
    found = sha256(json.dumps(manifest, sort_keys=True).encode())
    for array in arrays:
        found.update(array.data)
    return found.hexdigest()


def _digest(plain: dict[str, Any]) -> str:
    return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
