"""The pretrained teacher of the conversions: its checkpoint, students of it, held-out text, and what was measured.

`python benchmarks/SCRIPT source=FILE` makes the checkpoint, runs/converting/teacher, where there is none. Text is the
standard library's source in windows of 512 tokens, what is held out of it. Results go to results/converting.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from measure import CPU, RESULTS, describe_machine
from omegaconf import OmegaConf
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.building import build
from performer_lm.data.tokenizer.recipes import Restored
from performer_lm.evaluation.base import spread_places
from performer_lm.evaluation.hybrid import Apart, measure_apart, read
from performer_lm.model import PerformerLM

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "converting"
TEACHER = FOLDER / "teacher"
CONTEXT = 512
DATA = f"data=stdlib data.context={CONTEXT} data.batch_size=1 data.validation_bytes=2048 data.tokenizing_threads=1 "
DATA += f"data.cache_dir={ROOT / 'data' / 'cache'}"


class Text(NamedTuple):
    """Held-out text, and what the teacher makes of it."""

    teacher: PerformerLM
    windows: list[Tensor]
    known: list[Tensor]
    lengths: Tensor

    def measure(self, model: PerformerLM) -> Apart:
        """Return how far a model is from the teacher."""
        return measure_apart(model, self.teacher, self.windows, self.known, self.lengths, separator=None)


def read_options() -> dict[str, str]:
    """Return the options of the command line, `name=value`."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    return dict(word.split("=", 1) for word in sys.argv[1:])


def make_teacher(options: dict[str, str]) -> None:
    """Make the teacher's checkpoint where there is none, of the file that `source` names."""
    if not TEACHER.exists():
        if "source" not in options:
            sys.exit(f"{TEACHER.relative_to(ROOT)} is not there: source=FILE.gguf makes it")
        command = [sys.executable, "convert.py", f"source={Path(options['source']).resolve()}", f"out={TEACHER}"]
        subprocess.run(command, cwd=ROOT, check=True)


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


def open_text(count: int, *, context: int = CONTEXT) -> Text:
    """Return windows of held-out text, evenly spread, as the teacher reads them."""
    opened = checkpoint.read(checkpoint.find(str(TEACHER)))
    teacher, tokenizer = checkpoint.open_model(opened)
    assert isinstance(teacher, PerformerLM)
    section = {
        key: value
        for key, value in composed("data", *DATA.split(), f"data.context={context}").items()
        if key != "tokenizer"
    }
    data = build(section, key="data", more={"tokenizer": Restored(plain=tokenizer.to_dict())})
    data.prepare_held_out(whole=False)
    rows = data.held_out.rows(spread_places(data.held_out, count))
    windows, lengths = [*rows.split(1)], torch.from_numpy(data.held_out.byte_lengths)
    return Text(teacher, windows, read(teacher, windows, separator=None), lengths)


def load() -> dict[str, Any]:
    """Return what was measured so far."""
    file = RESULTS / "converting.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def save(**parts: Any) -> None:
    """Write down what was measured, beside what is there."""
    machine = {**describe_machine(CPU), "threads": torch.get_num_threads()}
    text = json.dumps({**load(), **parts, "machine": machine}, indent=1) + "\n"
    (RESULTS / "converting.json").write_text(text)
