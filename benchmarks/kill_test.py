"""Kill training at random moments, resume it, and compare all that it leaves with an unbroken run, bit for bit.

    python benchmarks/kill_test.py      the whole matrix: 32 cases in each precision, 2 kills each; writes
                                        results/kill_test.json
    python benchmarks/kill_test.py --cases 2 --kills 1 --saves 5 --seed 7 --precision bf16-mixed
    python benchmarks/kill_test.py --cases 2 --also trainer.deterministic=true      on a GPU
    python benchmarks/kill_test.py --attn delta        16 cases in each precision, of another backend

Every run is the real train.py, in a process forked from one that has imported what it needs, ended by SIGKILL and
started again with `ckpt=auto`. Compared are the losses and gradient norms of every step, every validation and sample,
and the whole last checkpoint: weights, projections, optimizer, schedule, generators, counters, the data's position,
averages.

Then kills during saves: a process that does nothing but save is killed again and again; each time the last file it
reported must be there and whole.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import performer_lm.training.prepare  # so that forked runs start at once
from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.training.loggers.record import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 40
COMMON = [
    *("debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes", "model.dropout=0.1"),
    *("data.context=32", "data.validation_bytes=2048", "callbacks.samples.max_new_tokens=4"),
    *(f"trainer.max_steps={STEPS}", "trainer.val_every=7", "trainer.save_every=3", "trainer.log_every=1"),
]
BACKENDS = {"favor": ["attn=favor", "attn.redraw_interval=4", "attn/features=optimal"], "flash": ["attn=flash"]}
PRECISIONS = ["32-true", "bf16-mixed"]
VOLATILE = {"train/tokens_per_second", "train/mfu"}


def make_matrix(backends: Iterable[str]) -> list[list[str]]:
    """Return the overrides of every case."""
    return [
        [f"trainer.accumulate_grad_batches={accumulate}", f"data.num_workers={workers}", *attn, *average, optimizer]
        for accumulate, workers, attn, average, optimizer in itertools.product(
            (1, 2),
            (0, 1),
            [BACKENDS.get(name, [f"attn={name}"]) for name in backends],
            ([], ["callbacks.ema.decay=0.9"]),
            ("optimizer=muon", "optimizer=adamw"),
        )
    ]


def start(*overrides: str) -> int:
    """Fork a process that runs train.py; return its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with contextlib.suppress(OSError):
            log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
        sys.argv = ["train.py", *overrides]
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as done:
            code = int(done.code or 0)
    finally:
        os._exit(code)


def finish(child: int) -> None:
    """Wait for a run, which has to end well."""
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"a run ended with code {code}:\n{Path('output.txt').read_text()[-3000:]}")


def kill_after(child: int, record: Path, *, step: int, delay: float) -> bool:
    """Kill a run some time after it has logged `step`; return whether it was still alive."""
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if record.exists() and any(row["step"] >= step for row in read_metrics(record)[-4:]):
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        time.sleep(0.001)
    return False


def run_case(options: list[str], *, kills: int, chance: random.Random) -> tuple[int, list[str]]:
    """Run once unbroken and once killed again and again; return how many kills hit, and what differs."""
    (Path() / "text.txt").write_text("".join(f"line {index} says {index * 37 % 101}\n" for index in range(1500)))
    finish(start(*COMMON, *options, "run_dir=whole"))
    record, hit = Path("runs/broken/metrics.jsonl"), 0
    for step in sorted(chance.randrange(1, STEPS) for _ in range(kills)):
        child = start(*COMMON, *options, "run_dir=runs/broken", "ckpt=auto")
        hit += kill_after(child, record, step=step, delay=chance.uniform(0, 0.06))
    finish(start(*COMMON, *options, "run_dir=runs/broken", "ckpt=auto"))
    return hit, list(differences(Path("whole"), Path("runs/broken")))


def differences(whole: Path, broken: Path) -> Iterator[str]:
    """Yield the place of each difference between two runs: rows of the record, samples, then what files hold."""
    rows = [[strip(row) for row in read_metrics(run / "metrics.jsonl")] for run in (whole, broken)]
    if [row["step"] for row in rows[0]] != [row["step"] for row in rows[1]]:
        yield "metrics.jsonl: other steps"
    for ours, theirs in zip(*rows, strict=False):
        if ours != theirs:
            yield f"metrics.jsonl: {ours} / {theirs}"
            break
    if (whole / "samples.txt").read_bytes() != (broken / "samples.txt").read_bytes():
        yield "samples.txt"
    for name in ("last", "best"):
        files = [checkpoint.read(run / "checkpoints" / f"{name}.ckpt").content for run in (whole, broken)]
        yield from (f"{name}.ckpt: {place}" for place in unequal(*files))


def strip(row: dict[str, float]) -> dict[str, float]:
    """Return a row of metrics without those that measure time."""
    return {key: value for key, value in row.items() if key not in VOLATILE}


def unequal(ours: Any, theirs: Any, place: str = "") -> Iterator[str]:
    """Yield where two nested values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            yield from unequal(ours.get(key), theirs.get(key), f"{place}.{key}")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from unequal(*pair, f"{place}[{index}]")
    elif isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if not torch.equal(ours, theirs):
            yield place
    elif ours != theirs and not (isinstance(ours, float) and math.isnan(ours) and math.isnan(theirs)):
        yield f"{place}: {ours!r} / {theirs!r}"


def kill_saves(count: int, *, chance: random.Random) -> int:
    """Kill a process in the middle of its saves `count` times; return how often the last checkpoint was lost."""
    folder, lost = Path("saves"), 0
    folder.mkdir()
    for _ in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            save_for_ever(folder, writing)
        os.close(writing)
        with os.fdopen(reading) as reports:
            reported = int(reports.readline())
            time.sleep(chance.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reported = max([reported, *map(int, reports.read().split("\n")[:-1])])
        try:
            lost += int(checkpoint.read(folder / "last.ckpt").content["step"]) < reported
        except ValueError as error:
            print(error)
            lost += 1
    checkpoint.delete_stale(folder)
    assert not list(folder.glob("*.tmp"))
    return lost


def save_for_ever(folder: Path, reports: int) -> None:
    """Save one checkpoint after the other, keeping two, and report each that is done."""
    existing = checkpoint.named_by_step(folder)
    section = checkpoint.describe(model={}, tokenizer=ByteTokenizer(), fingerprint={}, seed=0)
    for step in itertools.count(int(existing[0].name[5:11]) + 1 if existing else 1):
        content = {"performer_lm": section, "state_dict": {}, "step": step, "numbers": torch.rand(1_000_000)}
        path = folder / checkpoint.name_of(step)
        checkpoint.save(content, path)
        checkpoint.point(folder / "last.ckpt", path)
        os.write(reports, f"{step}\n".encode())
        for old in checkpoint.named_by_step(folder)[2:]:
            checkpoint.remove(old)


def main() -> None:
    """Go through the matrix and say how many kills it survived."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--attn", nargs="+", default=list(BACKENDS), help="backends of the matrix")
    parser.add_argument("--cases", type=int, help="how many of the matrix, drawn; without it, all")
    parser.add_argument("--kills", type=int, default=2, help="of each case")
    parser.add_argument("--saves", type=int, default=100, help="how many saves to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, help="of the runs, each through all cases")
    parser.add_argument("--also", nargs="+", default=[], help="overrides of all runs")
    args = parser.parse_args()
    assert performer_lm.training.prepare is not None
    chance = random.Random(args.seed)
    results: list[dict[str, Any]] = []
    matrix = make_matrix(args.attn)
    count = len(matrix) if args.cases is None else args.cases
    cases = itertools.product(args.precision, chance.sample(matrix, count))
    for options in ([f"trainer.precision={precision}", *case, *args.also] for precision, case in cases):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            hit, differing = run_case(options, kills=args.kills, chance=chance)
        results.append({"options": options, "kills": hit, "survived": 0 if differing else hit})
        print(f"{hit} kills, {'the same' if not differing else 'DIFFERENT: ' + '; '.join(differing[:5])}: {options}")
    tried, survived = (sum(result[key] for result in results) for key in ("kills", "survived"))
    print(f"kills survived {survived} / tried {tried}", flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        lost = kill_saves(args.saves, chance=chance)
    print(f"saves killed {args.saves} / checkpoints lost {lost}", flush=True)
    if count == len(matrix) and (args.attn, args.precision, args.also) == (list(BACKENDS), PRECISIONS, []):
        counts = {"tried": tried, "survived": survived, "saves_killed": args.saves, "checkpoints_lost": lost}
        text = json.dumps({**counts, "cases": results}, indent=2) + "\n"
        (ROOT / "benchmarks" / "results" / "kill_test.json").write_text(text)
    sys.exit(survived < tried or not tried or lost > 0)


if __name__ == "__main__":
    main()
