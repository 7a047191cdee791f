"""How often linear attention sums weights pair by pair, because features span more than float32 holds on one scale.

    python benchmarks/exact_form.py [steps=300] [threads=1]   train the default and performer_classic, and look at them
    python benchmarks/exact_form.py CHECKPOINT ...            look at these files or run folders, and at their starts

Of four held-out windows, per layer: the share of tokens that this CPU does pair by pair, where all heads and windows of
a block decide together; the share of chunks of 64 tokens of one head of one window, each for itself; and how many
factors of 2 the widest feature of such a chunk spans, on average and at most (`chunks.REACH` is the limit). The engine
itself takes the windows and decides. Writes results/exact_form.json.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from measure import write_results
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.attention.favor import FavorAttention
from performer_lm.cli.opening import open_from
from performer_lm.evaluation.approximation.model import Vectors, watch
from performer_lm.evaluation.base import pick_windows
from performer_lm.evaluation.measured_text import open_data
from performer_lm.ops.linear.chunks import Chunks
from performer_lm.ops.linear.sequence import Walk
from performer_lm.ops.linear.state import TILE, Geometry, LinearState, Scratch, choose_geometry, empty_state
from performer_lm.ops.linear.tokens import Tokens, cut
from performer_lm.ops.maps import BlockMap, Maps
from performer_lm.ops.precision import LOG2_E

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "exact_form"
ARMS = {"favor": ["attn=favor"], "performer_classic": ["experiment=performer_classic"]}
WINDOWS = 4
ALONE = Geometry(TILE, TILE, one_scale=False)
"""Every chunk for itself."""


class Row(NamedTuple):
    """The figures of one layer."""

    run: str
    step: int
    layer: str
    tokens: float  # share done pair by pair
    chunks: float  # the same of chunks alone
    span: float  # mean of a chunk's widest feature
    widest: float


class Counting(Walk):
    """Counts the tokens whose weights are summed pair by pair."""

    pair_by_pair = 0

    def open(self, part: slice, state: LinearState) -> tuple[Tokens, Chunks] | list[slice]:
        """Open a block as the engine does."""
        opened = super().open(part, state)
        if not isinstance(opened, list) and opened[1].pull_own is not None:
            self.pair_by_pair += part.stop - part.start
        return opened


def share(maps: Maps, tokens: Tokens, geometry: Geometry) -> float:
    """Return the share of tokens that are done pair by pair from an empty state on."""
    b, g, n, e = tokens.values.shape
    device = tokens.values.device
    m = maps.key.tensors[0].shape[1]
    state = LinearState(*(x.flatten(0, 1) for x in empty_state(g, b, m, e, device=device, dtype=torch.float32)))
    walk = Counting(maps, tokens, geometry, Scratch(state.sums.dtype, device))
    for part in cut(n, geometry.block, geometry.tile):
        state = walk.forward(part, state, None)
    return walk.pair_by_pair / n


def alone(maps: Maps, tokens: Tokens) -> Iterator[tuple[Maps, Tokens]]:
    """Yield every head of every sequence with its maps."""
    q, k, v, gain, decay, _, _ = tokens
    r = q.shape[1] // k.shape[1]

    def of_head(a_map: BlockMap, head: int) -> BlockMap:
        return a_map.with_tensors(tuple(x[head : head + 1] for x in a_map.tensors))

    for row in range(k.shape[0]):
        for head in range(k.shape[1]):
            own, queries = slice(head, head + 1), slice(head * r, (head + 1) * r)
            there = (None if x is None else x[row : row + 1, own] for x in (gain, decay))
            keys, values = (x[row : row + 1, own] for x in (k, v))
            one = Maps(query=of_head(maps.query, head), key=of_head(maps.key, head), groups=1)
            yield one, Tokens(q[row : row + 1, queries], keys, values, *there, None, None)


def spans(maps: Maps, keys: Tensor) -> list[float]:
    """Return how many factors of 2 the widest feature of each chunk of a head's keys `(1, 1, n, d)` spans."""
    logs, gain = maps.key(keys[0]).log_scale, maps.key.gain(keys[0])
    assert logs is not None
    logs = LOG2_E * (logs if gain is None else logs + gain[..., None])
    return [float((part.amax(dim=1) - part.amin(dim=1)).amax()) for part in logs.split(TILE, dim=1)]


def look_at(name: str, model: Any, windows: Tensor, step: int) -> list[Row]:
    """Count in every layer of a model."""
    rows: list[Row] = []

    def look(layer: str, attention: FavorAttention, vectors: Vectors, more: dict[str, Any]) -> None:
        q, k, gain = attention.features.prepare(*vectors[:2])
        query, key = (a_map.to(torch.float32) for a_map in attention.features.maps())
        assert isinstance(query, BlockMap)
        assert isinstance(key, BlockMap)
        maps = Maps(query=query, key=key, groups=k.shape[1])
        tokens = Tokens(q, k, vectors[2], gain, more.get("log_decay"), None, None)
        state = attention.init_state(len(k), max_len=k.shape[2], device=k.device, dtype=k.dtype)
        together = share(maps, tokens, choose_geometry(state.sums, block=attention.chunk_size))
        heads = list(alone(maps, tokens))
        singly = fmean(share(*head, ALONE) for head in heads)
        found = [span for own, head in heads for span in spans(own, head.keys)]
        rows.append(Row(name, step, layer, together, singly, fmean(found), max(found)))

    watch(model, look, lambda: model(windows))
    return rows


def measure(name: str, path: Path, *, from_start: bool) -> list[Row]:
    """Look at a checkpoint, and before it at its model as it is before the first step."""
    cfg = compose("evaluate", overrides=["device=cpu"])
    cfg.ckpt = str(path)
    opened = open_from(cfg)
    data = open_data(cfg.data, opened.checkpoint, opened.tokenizer)
    windows = pick_windows(data.held_out, WINDOWS)[:, :-1]
    rows = []
    if from_start:
        torch.manual_seed(opened.checkpoint.section["seed"])
        rows = look_at(name, checkpoint.build(opened.checkpoint.section["model"]), windows, 0)
    return rows + look_at(name, opened.model, windows, int(opened.checkpoint.content["global_step"]))


def train(name: str, steps: int, threads: int) -> Iterator[Path]:
    """Train, unless it was done before, and yield the checkpoints of the middle and the end."""
    folder = FOLDER / f"{name}-{steps}"
    if not (folder / "summary.json").exists():
        words = [*ARMS[name], f"trainer.max_steps={steps}", f"trainer.val_every={steps // 2}", f"run_dir={folder}"]
        words += ["callbacks=[]", "data.validation_bytes=32768"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, env=environment)
    yield from sorted((folder / "checkpoints").glob("step=*.ckpt"))


def tell(row: Row) -> None:
    """Print one line of the table."""
    print(
        f"{row.run:28} {row.step:6} {row.layer:8} {row.tokens:9.2%} {row.chunks:9.2%}",
        f"{row.span:7.0f} {row.widest:7.0f}",
        flush=True,
    )


def main() -> None:
    """Look, print, write."""
    options = {key: int(value) for key, _, value in (word.partition("=") for word in sys.argv[1:]) if value.isdigit()}
    given = [Path(word) for word in sys.argv[1:] if not word.startswith(("steps=", "threads="))]
    threads = options.get("threads", 1)
    torch.set_num_threads(threads)
    print(f"{'run':28} {'step':>6} {'layer':8} {'tokens':>9} {'chunks':>9} {'span':>7} {'widest':>7}")
    rows: list[Row] = []
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        jobs = [(path.name, checkpoint.find(str(path)), True) for path in given]
        if not given:
            for name in ARMS:
                paths = list(train(name, options.get("steps", 300), threads))
                jobs += [(name, path, path is paths[0]) for path in paths]
        for name, path, from_start in jobs:
            for row in measure(name, path, from_start=from_start):
                rows.append(row)
                tell(row)
    write_results("exact_form", {"rows": [row._asdict() for row in rows]})


if __name__ == "__main__":
    main()
