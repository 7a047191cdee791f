from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.session import stream_text
from performer_lm.training.callbacks.samples import cut
from performer_lm.training.run import Run

Start = Callable[..., Run]


def test_samples_are_what_generating_gives_and_all_are_kept(start: Start) -> None:
    start("callbacks.samples.prompt='line 1'", "run_dir=runs/a").fit()
    text = Path("runs/a/samples.txt").read_text()
    assert [line for line in text.splitlines() if line.startswith("===")] == [
        "=== sample at step 2 ===",
        "=== sample at step 4 ===",
    ]
    model, tokenizer = checkpoint.open_model(checkpoint.read(Path("runs/a/checkpoints/last.ckpt")))
    sampler = Sampler(temperature=0.8, top_k=40)
    made = "".join(stream_text(model, tokenizer, "line 1", max_new_tokens=16, sampler=sampler, seed=0))
    assert text.endswith(f"=== sample at step 4 ===\nline 1{made}\n\n")


def test_sampling_changes_nothing_of_the_run(start: Start) -> None:
    for run, more in {"with": [], "without": ["~callbacks.samples"]}.items():
        start("model.dropout=0.1", *more, f"run_dir=runs/{run}").fit()
    one, other = (checkpoint.read(Path(f"runs/{run}/checkpoints/last.ckpt")).weights for run in ("with", "without"))
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])) for name, value in one.items())


@pytest.mark.parametrize(("prompt", "is_written"), [("line 1", True), ("line " * 7, False)])
def test_samples_end_where_learned_positions_do(start: Start, prompt: str, is_written: bool) -> None:
    options = ["model/absolute=learned", "data.context=32", "callbacks.samples.max_new_tokens=96"]
    run = start(*options, f"callbacks.samples.prompt='{prompt}'")
    run.fit()
    assert (run.folder / "samples.txt").exists() == is_written


WRITTEN = "=== sample at step 2 ===\nab\n\n=== sample at step 4 ===\ncd === sample at step 9 ===\n\n=== sample at st"


@pytest.mark.parametrize(("step", "kept"), [(1, 0), (2, WRITTEN.index("=== sample at step 4")), (4, len(WRITTEN))])
def test_a_rewound_run_forgets_later_samples(step: int, kept: int) -> None:
    assert cut(WRITTEN, step=step) == WRITTEN[:kept]
