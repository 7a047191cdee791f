import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from performer_lm.training.run import Run


class Projections(Callback):
    """Keeps a projection at every micro-batch, as its forward sees it."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        named = dict(pl_module.named_buffers())
        self.seen.append(next(value for name, value in named.items() if name.endswith("projection")).clone())


@pytest.mark.parametrize("parts", [1, 2])
def test_projections_change_between_steps_and_by_the_step_alone(start: Callable[..., Run], parts: int) -> None:
    common = ["attn=favor", "attn.redraw_interval=2", "trainer.max_steps=6"]
    common.append(f"trainer.accumulate_grad_batches={parts}")
    run, kept = start(*common, "run_dir=runs/a"), Projections()
    run.trainer.callbacks.append(kept)
    run.fit()
    of_step = kept.seen[::parts]
    assert all(torch.equal(kept.seen[i], of_step[i // parts]) for i in range(len(kept.seen)))
    assert [torch.equal(one, other) for one, other in itertools.pairwise(of_step)] == [
        True,
        False,
        True,
        False,
        True,
    ]
