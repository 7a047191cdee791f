"""How fast text becomes ids, and what a step waits for its batch.

    python benchmarks/data.py

Tokenising: MB/s of text (the standard library, four times over) to a flat array on disk, on one thread and on two, and
bytes per token, for every tokenizer trained in place. Batches: seconds to have one at hand, from the loader without
workers and with one, and gathered from resident ids; and the share of a training step of the default model that is
spent waiting for it. In turns within one process; medians. Writes results/data.json and data.png.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from measure import RESULTS, THREADS, time_together, write_results
from omegaconf import OmegaConf
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.data.build import pieces, write_arrays
from performer_lm.data.corpora.base import Corpus, Document
from performer_lm.data.corpora.collection import Collection
from performer_lm.data.corpora.standard_library import StandardLibrary
from performer_lm.data.held_out import split_documents
from performer_lm.data.ids import HostIds
from performer_lm.data.layouts import StreamLayout
from performer_lm.data.loader import BatchShare, TrainBatches, TrainLoader
from performer_lm.data.progress import PreparationProgress
from performer_lm.data.survey import read_through
from performer_lm.data.tokenizer import Tokenizer
from performer_lm.data.tokenizer.recipes import BytePairs, Bytes, Characters, TokenizerRecipe, Unigram, WordPieces
from performer_lm.data.windows import TextWindows
from performer_lm.objectives import shift

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIGS = Path(__file__).parents[1] / "configs"
COPIES, REPEATS = 4, 3
BATCH, CONTEXT, VOCAB = 4, 512, 2048  # the default run's
BATCHES, STEPS = 400, 12
TRAINED: dict[str, Any] = {"vocab_size": VOCAB, "train_bytes": 1 << 28}
RECIPES: dict[str, TokenizerRecipe] = {
    "bytes": Bytes(),
    "characters": Characters(vocab_size=None, fallback=True),
    "bpe": BytePairs(**TRAINED),
    "wordpiece": WordPieces(**TRAINED),
    "unigram": Unigram(**TRAINED),
}


class Texts(Corpus):
    """The standard library several times, in memory: what is timed is not the disk."""

    label = "texts"

    def __init__(self) -> None:
        found = list(StandardLibrary().documents())
        self._documents = [Document(f"{n}/{each.name}", each.text) for n in range(COPIES) for each in found]

    def documents(self) -> Iterator[Document]:
        """Yield the documents."""
        yield from self._documents


def tokenising() -> dict[str, Any]:
    """Return MB/s by tokenizer and threads, the seconds training took and the tokens there were."""
    collection = Collection({"texts": Texts()}, errors="strict")
    survey = read_through(collection)
    split = split_documents(survey, fraction=0.05)
    size = int(survey.sizes.sum())
    once = [document.text for document in StandardLibrary().documents()]
    found: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        start = time.perf_counter()
        tokenizer = recipe.build(once, num_bytes=sum(map(len, once)))
        trained = time.perf_counter() - start
        tokens: list[int] = []

        def run(threads: int, tokenizer: Tokenizer = tokenizer, tokens: list[int] = tokens) -> None:
            folder = Path(tempfile.mkdtemp())
            texts = pieces(collection, survey, split, fraction=0.05)
            built = write_arrays(
                folder,
                texts,
                tokenizer,
                collection=collection,
                dtype=np.min_scalar_type(tokenizer.end_id),
                threads=threads,
                progress=PreparationProgress(),
            )
            tokens.append(built.train_bounds[-1] + built.held_out_bounds[-1] + 2)
            shutil.rmtree(folder)

        seconds = time_together({str(n): lambda n=n: run(n) for n in (1, 2)}, repeats=REPEATS)
        found[name] = {
            "vocab_size": tokenizer.vocab_size,
            "training_seconds": round(trained, 2),
            "bytes_per_token": round(size / tokens[0], 3),
            "mb_per_second": {threads: round(size / 1e6 / taken, 1) for threads, taken in seconds.items()},
        }
        print(f"{name:10} {found[name]}", flush=True)
    return {"megabytes": round(size / 1e6, 1), "tokenizers": found}


def loaders(folder: Path) -> dict[str, TrainLoader]:
    """Return the ways to have a batch, over one array of ids on disk as long as the default run's."""
    path = folder / "ids.bin"
    np.random.default_rng(0).integers(0, VOCAB, 2_900_000).astype(np.uint16).tofile(path)
    ids = HostIds(np.memmap(path, dtype=np.uint16, mode="r"))
    layout = StreamLayout(len(ids), seed=0, context=CONTEXT)
    on_disk = TextWindows(ids, layout, context=CONTEXT)
    resident = on_disk.to(torch.device("cpu"))
    share = BatchShare(batch_size=BATCH, accumulation=1, ranks=1, rank=0)

    def loader(windows: TextWindows, workers: int) -> TrainLoader:
        batches = TrainBatches(windows, share, steps=1_000_000)
        return TrainLoader(batches, accumulation=1, done=lambda: 0, num_workers=workers)

    return {
        "loader, 0 workers": loader(on_disk, 0),
        "loader, 1 worker": loader(on_disk, 1),
        "device_resident": loader(resident, 0),
    }


def seconds_per_batch(ways: dict[str, TrainLoader]) -> dict[str, float]:
    """Return the median seconds to take a batch, as fast as they come."""
    streams = {name: iter(loader) for name, loader in ways.items()}

    def take(stream: Iterator[Tensor]) -> None:
        for _ in range(BATCHES):
            next(stream)

    seconds = time_together({name: lambda s=stream: take(s) for name, stream in streams.items()}, repeats=7)
    return {name: taken / BATCHES for name, taken in seconds.items()}


def stall_shares(ways: dict[str, TrainLoader]) -> dict[str, Any]:
    """Return the share of a step of the default model that is spent waiting for its batch."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train")
    section: Any = OmegaConf.to_container(cfg.model, resolve=True)
    model = checkpoint.build({**section, "vocab_size": VOCAB})
    streams = {name: iter(loader) for name, loader in ways.items()}
    waits: dict[str, list[float]] = {name: [] for name in streams}
    steps: dict[str, list[float]] = {name: [] for name in streams}
    for number in range(STEPS + 1):
        for name, stream in streams.items():
            start = time.perf_counter()
            inputs, targets = shift(next(stream))
            ready = time.perf_counter()
            logits = model(inputs)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            model.zero_grad()
            if number:  # the first one starts workers and warms up
                waits[name].append(ready - start)
                steps[name].append(time.perf_counter() - start)
    return {
        name: {
            "wait_seconds": round(statistics.median(waits[name]), 6),
            "step_seconds": round(statistics.median(steps[name]), 4),
            "share": round(sum(waits[name]) / sum(steps[name]), 6),
        }
        for name in streams
    }


def draw(results: dict[str, Any]) -> None:
    """Draw both tables."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    names = list(results["tokenizers"])
    for offset, threads in ((-0.2, "1"), (0.2, "2")):
        speeds = [results["tokenizers"][name]["mb_per_second"][threads] for name in names]
        left.bar(np.arange(len(names)) + offset, speeds, 0.4, label=f"data.tokenizing_threads={threads}")
    left.set_xticks(range(len(names)), names)
    left.set_yscale("log")
    left.set_ylabel("MB/s of text to ids on disk")
    left.legend(loc="center right")
    ways = list(results["batches"])
    right.barh(ways, [1e6 * results["batches"][name] for name in ways])
    right.set_xlabel(f"microseconds per batch of {BATCH} x {CONTEXT} ids")
    right.invert_yaxis()
    figure.savefig(RESULTS / "data.png", dpi=120)


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(THREADS)
    results = tokenising()
    with tempfile.TemporaryDirectory() as folder:
        ways = loaders(Path(folder))
        results["batches"] = {name: round(taken, 8) for name, taken in seconds_per_batch(ways).items()}
        print({name: f"{1e6 * taken:.0f} us" for name, taken in results["batches"].items()}, flush=True)
        results["stalls"] = stall_shares(ways)
        print(results["stalls"])
    write_results("data", results)
    draw(results)


if __name__ == "__main__":
    main()
