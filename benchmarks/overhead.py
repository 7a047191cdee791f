"""What the framework adds to a step: `python train.py`'s own run against a bare loop of the same model and batches.

    python benchmarks/overhead.py [override ...]

One process, two threads. After every step of the run, a bare step is taken on a copy of the model: loss, backward,
clipping, optimizer, schedule. So both see the same batches, weights and machine; with trainer.log_every=1 metrics are
logged at every step.
Validation, samples and checkpoints are left out; medians. Writes results/overhead.json. About two minutes on two quiet
cores.
"""

import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import THREADS, write_results
from steps import CONFIGS, step
from torch.optim.lr_scheduler import LambdaLR

from performer_lm.training.optim import parameter_groups
from performer_lm.training.prepare import prepare

STEPS, WARM_UP = 70, 10
DATA = Path(__file__).parents[1] / "data" / "cache"


class Alternate(Callback):
    """Times each step of the run, from the end of a bare step to its own end, and takes a bare step in between."""

    def __init__(self) -> None:
        self.framework: list[float] = []
        self.bare: list[float] = []
        self._mark = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the model as it begins."""
        task: Any = pl_module
        self.model = copy.deepcopy(task.model)
        self.optimizer = task.optimizer(parameter_groups(self.model, head=self.model.head))
        self.schedule = LambdaLR(self.optimizer, task.schedule(trainer.max_steps))
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time, and take the bare step."""
        start = time.perf_counter()
        self.framework.append(start - self._mark)
        task: Any = pl_module
        step(self.model, self.optimizer, task.objective, batch, forward=trainer.precision_plugin.forward_context)
        self.schedule.step()
        self._mark = time.perf_counter()
        self.bare.append(self._mark - start)


def main() -> None:
    """Train a run of its own with the bare steps in between."""
    torch.set_num_threads(THREADS)
    overrides = [f"trainer.max_steps={STEPS}", f"data.cache_dir={DATA}", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(CONFIGS, version_base="1.3"):
        os.chdir(folder)
        run = prepare(compose("train", overrides=overrides), overrides=overrides)
        alternate, trainer = Alternate(), cast(Any, run.trainer)  # Lightning does not declare its list of callbacks
        trainer.callbacks.append(alternate)
        run.fit()
        same = all(map(torch.equal, alternate.model.parameters(), run.task.model.parameters()))
    framework, bare = (statistics.median(times[WARM_UP:]) for times in (alternate.framework, alternate.bare))
    pairs = [ours / theirs - 1 for ours, theirs in zip(alternate.framework, alternate.bare, strict=True)][WARM_UP:]
    overhead = statistics.median(pairs)
    print(f"framework {1000 * framework:.1f} ms, bare loop {1000 * bare:.1f} ms, overhead {overhead:.2%}; same: {same}")
    if sys.argv[1:]:
        return
    results = {"steps": len(pairs), "framework_seconds": framework, "bare_seconds": bare, "overhead": overhead}
    write_results("overhead", {**results, "same_weights": same})


if __name__ == "__main__":
    main()
