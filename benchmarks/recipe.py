"""Performers against softmax at equal tokens, steps and tuning: what each arm gives, and what it is made of.

    python benchmarks/recipe.py [rates] [long] [seeds] [parts] [prose] [context] [jobs=1]   run what is missing
    python benchmarks/recipe.py table                                                       the tables alone

Each arm of `NOW` trains with three learning rates for 300 steps (`rates`), then for 1200 with the best of the three
(`long`) and more seeds (`seeds`), and for 300 without each extra (`parts`), in windows of 2048 (`context`) and on text
that is no code (`prose`: what installed packages say of themselves). A run is `python train.py` with the words in
`ARMS`, in runs/recipe/; one that was cut off goes on. About six hours of one core. The arms of `BEFORE` were
measured in bf16-mixed on NVIDIA H100 and H200 and are not run again.
Writes results/recipe.json and results/recipe.png.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from measure import CPU, RESULTS, describe_machine

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "recipe"
IDENTITY = "attn/features=identity attn.num_features=null"
NARROW, M64 = "model.heads=8 model.local_heads=0", "attn.num_features=64"  # heads of 32, the default before these runs
WIDE = "model.heads=4 model.local_heads=0"
ROTARY = "model=transformer attn=flash model.feed_forward.mult=4.5"  # as many parameters as the others
PARTS = {"convolution": "0", "decay": "false", "gate": "false"}
NOW = {  # configs/experiment: the default model with each attention, 4 heads of 64
    "default, flash": "experiment=recipe_flash",
    "default, favor": "experiment=recipe_favor",
    "default, delta": "experiment=recipe_delta",
    "default, delta 3 : flash 1": "experiment=recipe_hybrid",
    "default, rotary transformer": "experiment=recipe_transformer",
    "default, local of 128": "experiment=recipe_local",
}
WITHOUT = {
    f"{arm}, no {part}": f"{NOW[arm]} model.{part}={none}"
    for arm in ("default, delta", "default, favor", "default, flash")
    for part, none in PARTS.items()
}
WIDER = {
    "default, delta, m 128": f"{NOW['default, delta']} attn.num_features=128",
    "default, delta 3 : flash 1, m 128": f"{NOW['default, delta 3 : flash 1']} attn.backends.delta.num_features=128",
    "default, delta, identity": f"{NOW['default, delta']} {IDENTITY}",
}
HYBRID_M64 = "attn.backends.{0}.num_features=64"
DELTA_HYBRID = f"attn=hybrid attn.pattern=[delta,delta,delta,flash] {HYBRID_M64.format('delta')} {NARROW}"
BEFORE = {
    "flash": f"attn=flash {NARROW}",
    "favor": f"attn=favor {NARROW} {M64}",
    "delta": f"attn=delta {NARROW} {M64}",
    "hybrid delta": DELTA_HYBRID,
    "rotary transformer": f"{ROTARY} model.heads=8",
    "flash, 4 heads": f"attn=flash {WIDE}",
    "favor, 4 heads, m 128, 1 local": "attn=favor model.heads=4 model.local_heads=1 attn.num_features=128",  # default
    "delta, 4 heads, m 128, 1 local": "attn=delta model.heads=4 model.local_heads=1 attn.num_features=128",
    "hybrid delta, 4 heads": DELTA_HYBRID.replace("heads=8", "heads=4"),
    "rotary transformer, 4 heads": f"{ROTARY} model.heads=4",
    "local of 256, 4 heads": f"attn=local attn.window=256 {WIDE}",
    "hybrid favor": f"attn=hybrid {HYBRID_M64.format('favor')} {NARROW}",
    "delta, 2 local heads": f"attn=delta {M64} model.heads=8 model.local_heads=2",
    "favor, 2 local heads": f"attn=favor {M64} model.heads=8 model.local_heads=2",
    "delta, local layer": f"{DELTA_HYBRID.replace('flash]', 'local]')}",
    "delta, m 128": f"attn=delta {NARROW} attn.num_features=128",
    "favor, m 128": f"attn=favor {NARROW} attn.num_features=128",
    "delta, 4 heads, m 256": f"attn=delta {WIDE} attn.num_features=256",
    "delta, identity": f"attn=delta {IDENTITY} {NARROW}",
    "delta, identity, 2 heads": f"attn=delta {IDENTITY} model.heads=2 model.local_heads=0",
    "favor, hyperbolic": f"attn=favor attn/features=hyperbolic {NARROW} {M64}",
    "favor, learned": f"attn=favor attn/features=learned {NARROW} {M64}",
    "favor, taylor2": f"attn=favor attn/features=taylor2 {NARROW} {M64}",
    "classic": "experiment=performer_classic",
    **{
        f"{name}, no {part}": f"attn={name} {more} model.{part}={none}"
        for name, more in {"favor": f"{NARROW} {M64}", "delta": f"{NARROW} {M64}", "flash": NARROW}.items()
        for part, none in PARTS.items()
    },
}
ARMS = NOW | WIDER | WITHOUT | BEFORE
RATES = (1.0, 0.5, 2.0)
LR, MATRIX_LR = 6e-3, 0.02
STUDIES = ("rates", "long", "seeds", "parts", "prose", "context")


class Job(NamedTuple):
    """A training run."""

    study: str
    arm: str
    steps: int
    seed: int = 0
    rate: float | None = None  # times the default learning rates; None: the arm's best at 300 steps

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        of = f"-{self.study}" if self.study in ("context", "prose") else ""
        return f"{self.arm.replace(', ', '-').replace(' ', '_')}-{self.steps}-s{self.seed}-x{self.rate or 'best'}{of}"

    def words(self) -> list[str]:
        """Return what is said to train.py."""
        assert self.rate is not None
        words = [*ARMS[self.arm].split(), f"trainer.max_steps={self.steps}", f"seed={self.seed}"]
        words += [f"optimizer.lr={self.rate * LR:g}", f"optimizer.matrix_lr={self.rate * MATRIX_LR:g}"]
        if self.study == "context":
            words += ["data.context=2048", "data.batch_size=1"]
        if self.study == "prose":
            words += ["data=files", f"data.path={write_prose()}"]
        return words


def plan() -> Iterator[Job]:
    """Yield the runs of all studies, those that others wait for first."""
    yield from (Job("rates", arm, 300, rate=rate) for rate in RATES for arm in NOW)
    yield from (Job("long", arm, 1200) for arm in NOW)
    yield from (Job("seeds", arm, 1200, 1) for arm in NOW)
    yield from (Job("parts", arm, 300, rate=1.0) for arm in WITHOUT)
    yield from (Job("prose", arm, 300) for arm in NOW)
    yield from (Job("context", arm, 300) for arm in NOW)
    yield from (Job("seeds", arm, 1200, 2) for arm in NOW)


def write_prose() -> Path:
    """Write what the installed packages say of themselves, once, and return the file."""
    file = FOLDER / "prose.txt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        texts = {each.metadata["Name"]: each.read_text("METADATA") or "" for each in distributions()}
        file.write_text("\n".join(texts[name] for name in sorted(texts)))
    return file


def best_rate(arm: str, rows: list[dict[str, Any]]) -> float | None:
    """Return the rate of the fewest bits per byte at 300 steps, None before all three are known."""
    found = {row["rate"]: row["bpb"] for row in rows if (row["study"], row["arm"]) == ("rates", arm)}
    return min(found, key=lambda rate: found[rate]) if len(found) == len(RATES) else None


def read_row(job: Job, folder: Path) -> dict[str, Any] | None:
    """Return the figures of a run that ended."""
    file = folder / "summary.json"
    if not file.exists():
        return None
    summary = json.loads(file.read_text())
    if summary["steps"] < job.steps:
        return None
    keys = {"parameters": "parameters", "tokens_per_second": "tokens_per_second", "last_val_bpb": "bpb"}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else describe_machine(CPU)["cpu"]
    return {**job._asdict(), **{name: summary[key] for key, name in keys.items()}, "machine": machine}


def run_missing(studies: list[str], jobs: int) -> None:
    """Run what is missing, so many at a time."""
    rows, left, running = load_rows(), [job for job in plan() if job.study in studies], []
    done = {(row["study"], row["arm"], row["steps"], row["seed"], row["rate"]) for row in rows}
    left = [job for job in left if job not in done]
    while left or running:
        for job in list(left):
            if len(running) == jobs:
                break
            rate = job.rate or best_rate(job.arm, rows)
            if rate is not None:
                left.remove(job)
                ready = job._replace(rate=rate)
                if ready not in done:
                    running.append((ready, subprocess.Popen(command(ready), cwd=ROOT)))
        ended = [(job, process) for job, process in running if process.poll() is not None]
        for job, process in ended:
            running.remove((job, process))
            if row := read_row(job, FOLDER / job.name):
                rows.append(row)
                save_rows(rows)
            else:
                print(f"{job.name} ended with {process.returncode}", flush=True)
        if not running and not ended and left:
            print(f"left out, for their learning rates are not known: {[job.name for job in left]}")
            return
        time.sleep(0.2)


def command(job: Job) -> list[str]:
    """Return the command of a run, which goes on from where it was cut off."""
    folder = FOLDER / job.name
    more = [f"ckpt={folder}"] if (folder / "checkpoints").exists() else []
    return [sys.executable, "train.py", *job.words(), f"run_dir={folder}", "callbacks=[]", *more]


def load_rows() -> list[dict[str, Any]]:
    """Return the runs measured so far."""
    file = RESULTS / "recipe.json"
    return list(json.loads(file.read_text())["runs"]) if file.exists() else []


def save_rows(rows: list[dict[str, Any]]) -> None:
    """Write down the runs measured so far."""
    (RESULTS / "recipe.json").write_text(json.dumps({"runs": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the bits per byte of every arm: by learning rate at 300 steps, over seeds at 1200."""
    lines = [
        "| arm | parameters | 300 steps at 0.5, 1, 2 times the learning rates | 1200 steps | prose | context 2048 |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        if not own:
            continue
        rates = {row["rate"]: row["bpb"] for row in own if row["study"] in ("rates", "parts")}
        best = min(rates.values(), default=math.nan)
        chosen = best if len(rates) == len(RATES) else math.nan
        cells = [f"**{rates[r]:.4f}**" if rates[r] == chosen else f"{rates[r]:.4f}" for r in sorted(rates)]
        listed = {name: [r["bpb"] for r in own if r["study"] in of] for name, of in GROUPS.items()}
        others = [spread(found) for found in listed.values()]
        lines.append(f"| {arm} | {own[0]['parameters']:,} | {' / '.join(cells)} | {' | '.join(others)} |")
    return "\n".join(lines)


GROUPS = {"long": ("long", "seeds"), "prose": ("prose",), "context": ("context",)}


def spread(found: list[float]) -> str:
    """Return the mean of several seeds and their standard deviation, or the one figure."""
    if len(found) < 2:
        return f"{found[0]:.4f}" if found else ""
    return f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f} ({len(found)})"


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw the arms by their bits per byte after 1200 steps, every seed a dot."""
    found = {arm: [r["bpb"] for r in rows if r["arm"] == arm and r["study"] in GROUPS["long"]] for arm in ARMS}
    order = sorted((arm for arm in ARMS if found[arm]), key=lambda arm: -statistics.mean(found[arm]))
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.3 * len(order)))
    for height, arm in enumerate(order):
        has_cache = any(word in arm for word in ("flash", "hybrid", "rotary"))
        colour = "tab:orange" if has_cache else "tab:blue"
        axes.plot(found[arm], [height] * len(found[arm]), "o", color=colour, alpha=0.6)
        axes.plot([statistics.mean(found[arm])], [height], "|", color=colour, markersize=14)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("bits per byte after 1200 steps (blue: a state of constant size)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "recipe.png", dpi=150)


def main() -> None:
    """Run what is missing and print the tables."""
    jobs = next((int(word.partition("=")[2]) for word in sys.argv[1:] if word.startswith("jobs=")), 1)
    words = [word for word in sys.argv[1:] if not word.startswith("jobs=")]
    if words != ["table"]:
        run_missing(words or list(STUDIES), jobs)
    rows = load_rows()
    print(table(rows))
    draw(rows)


if __name__ == "__main__":
    main()
