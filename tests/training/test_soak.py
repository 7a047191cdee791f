"""A long run holds no more at its end than near its beginning."""

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from performer_lm.training.run import Run


class Held(Callback):
    """Notes memory and open files every 100 steps."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.files: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step % 100 == 0:
            self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]))
            self.files.append(len(os.listdir("/proc/self/fd")))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of a process")
def test_memory_and_open_files_stay_flat_over_2000_steps(start: Callable[..., Run]) -> None:
    steps = ["trainer.max_steps=2000", "trainer.val_every=50", "trainer.log_every=10", "data.validation_bytes=2048"]
    more = ["attn=favor", "attn.redraw_interval=7", "callbacks.ema.decay=0.99", "callbacks.diagnostics.every=100"]
    run, held = start(*steps, *more, "run_dir=runs/a"), Held()
    run.trainer.callbacks.append(held)
    run.fit()
    early, late = median(held.memory[3:6]), median(held.memory[-3:])
    print(f"resident memory grew by {late / early - 1:.2%} from step 500 to 2000; {held.memory}")
    assert late < 1.05 * early
    assert max(held.files[3:]) <= held.files[2] + 1
    assert len(list(Path("runs/a/checkpoints").glob("step=*.ckpt"))) <= 3
