"""Tests of CUDA devices: `pytest -m gpu`, which fails where there is none.

GPU_TESTS_ON=cpu runs them on a CPU, to try the tests themselves.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from performer_lm.training.loggers.record import read_metrics

Train = Callable[..., list[dict[str, float]]]
TINY = [
    *("debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes", "data.validation_bytes=2048"),
    *("~callbacks.samples", "trainer.log_every=1", "trainer.val_every=100"),
]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device under test."""
    kind = os.environ.get("GPU_TESTS_ON", "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device", pytrace=False)
    return torch.device(kind)


@pytest.fixture
def train(invoke: Callable[..., tuple[int, str, str]], text: None, device: torch.device) -> Iterator[Train]:
    """Return a function from overrides to the training metrics of a tiny run, in `runs/new` if they name no folder."""

    def run(*overrides: str) -> list[dict[str, float]]:
        given = dict(override.partition("=")[::2] for override in overrides)
        code, out, err = invoke(*TINY, f"trainer.accelerator={device.type}", "run_dir=runs/new", *overrides)
        assert code == 0, out + err
        rows = read_metrics(Path(given.get("run_dir", "runs/new")) / "metrics.jsonl")
        return [row for row in rows if "train/loss" in row]

    yield run
    torch.use_deterministic_algorithms(False)
