import subprocess
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from performer_lm.data import ids
from performer_lm.data.ids import HostIds
from performer_lm.data.text import TextData
from performer_lm.data.windows import IGNORE
from performer_lm.objectives import shift

CONFIGS = Path(__file__).parents[2] / "configs"


def global_batch(data: TextData, step: int) -> Tensor:
    return data.training.rows(step * 8 + np.arange(8))


class Recorder(lightning.LightningModule):
    """A one-parameter model that remembers the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: Tensor) -> Tensor:
        self.seen.append(batch)
        return self.weight * batch.float().mean()

    def validation_step(self, batch: Tensor) -> None:
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class BrokenError(Exception):
    pass


class SaveAndBreak(Callback):
    """Saves after step `stop`, and breaks the run off in the middle of the next."""

    def __init__(self, stop: int, path: str) -> None:
        self.stop = stop
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) == self.stop * trainer.accumulate_grad_batches:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.stop:
            raise BrokenError


def trainer_for(steps: int, *callbacks: Callback, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        **options,
    )


def fit(data: TextData, steps: int, *callbacks: Callback, ckpt_path: str | None = None, **options) -> Recorder:
    model = Recorder()
    trainer_for(steps, *callbacks, **options).fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return model


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_sees_the_batches_of_its_seed_whatever_the_accumulation(text_data, accumulation, workers):
    data = text_data(num_workers=workers)
    model = fit(data, 5, accumulate_grad_batches=accumulation, val_check_interval=100)
    wanted = [global_batch(data, step) for step in range(5)]
    assert len(model.seen) == 5 * accumulation
    assert torch.equal(torch.cat(model.seen), torch.cat(wanted))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_out_the_same_global_batch(text_data, tmp_path, ranks, monkeypatch):
    data = text_data()
    data.prepare()
    monkeypatch.setattr(lightning.Trainer, "world_size", ranks)
    wanted = [global_batch(data, step) for step in range(3)]
    trained, validated = [], []
    for rank in range(ranks):
        monkeypatch.setattr(lightning.Trainer, "global_rank", rank)
        data.trainer = trainer_for(3, accumulate_grad_batches=2)
        trained.append(torch.stack(list(data.train_dataloader())))
        validated.append(torch.stack(list(data.val_dataloader())))
    assert torch.equal(torch.stack(trained, dim=1).reshape(3, 8, 17), torch.stack(wanted))
    rows = torch.stack(validated, dim=1).reshape(-1, 17)
    targets = shift(rows)[1]
    assert torch.equal(
        targets[targets != IGNORE],
        torch.tensor(data.held_out_ids[1 : 1 + targets.numel()].astype(np.int64))[: (targets != IGNORE).sum()],
    )


@pytest.mark.parametrize(("accumulation", "workers", "stop"), [(1, 0, 1), (1, 2, 4), (2, 0, 3), (2, 1, 5)])
def test_a_resumed_run_sees_exactly_what_the_unbroken_one_sees(text_data, tmp_path, accumulation, workers, stop):
    options = {"accumulate_grad_batches": accumulation, "val_check_interval": 2 * accumulation}
    saved = str(tmp_path / "last.ckpt")
    unbroken = fit(text_data(num_workers=workers), 8, **options)
    with pytest.raises(BrokenError):
        fit(text_data(num_workers=workers), 8, SaveAndBreak(stop, saved), **options)
    resumed = fit(text_data(num_workers=workers), 8, ckpt_path=saved, **options)
    assert torch.equal(torch.cat(resumed.seen), torch.cat(unbroken.seen[stop * accumulation :]))
    assert torch.equal(resumed.weight, unbroken.weight)


def test_a_finished_run_can_be_made_longer(text_data, tmp_path):
    class SaveAtEnd(Callback):
        def on_train_end(self, trainer, module) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    longer = fit(text_data(), 7, val_check_interval=2)
    fit(text_data(), 4, SaveAtEnd(), val_check_interval=2)
    resumed = fit(text_data(), 7, ckpt_path=str(tmp_path / "end.ckpt"), val_check_interval=2)
    assert torch.equal(torch.cat(resumed.seen), torch.cat(longer.seen[4:]))
    assert torch.equal(resumed.weight, longer.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"steps": 5, "accumulate_grad_batches": 3},
            r"batch_size \(8\) must be a multiple of ranks \(1\) x .* \(3\)",
        ),
        ({"steps": -1}, r"trainer.max_steps \(-1\) must be at least 0"),
    ],
)
def test_a_trainer_that_does_not_fit_is_refused(text_data, tmp_path, options, message):
    data = text_data()
    data.prepare()
    data.trainer = trainer_for(**options)
    with pytest.raises(ValueError, match=message):
        data.share(data.trainer)
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()


@pytest.mark.parametrize("name", ["context", "batch_size", "validation_bytes"])
def test_sizes_below_one_are_refused(text_data, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        text_data(**{name: 0})


def test_loaders_leave_the_global_generators_alone(text_data, tmp_path):
    data = text_data()
    data.prepare()
    data.trainer = trainer_for(2)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert all(batch.shape == (8, 17) for batch in loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("resident", [False, True])
def test_only_windows_gathered_on_the_host_are_pinned(text_data, monkeypatch, resident):
    data = text_data(device_resident=resident)
    data.prepare()
    data.trainer = trainer_for(2)
    monkeypatch.setattr(TextData, "device", torch.device("cuda"))
    monkeypatch.setattr(ids, "ResidentIds", lambda values, device: HostIds(values))  # there is no such device here
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.pin_memory is not resident


TWO_RANKS = """
import sys, os
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from conftest import build_text_data
from test_module import Recorder, trainer_for

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model = Recorder()
    trainer = trainer_for(3, strategy="ddp", devices=2, accumulate_grad_batches=2, val_check_interval=6)
    trainer.fit(model, build_text_data(folder))
    torch.save([torch.stack(model.seen), torch.stack(model.validated)], folder / f"rank{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_on_what_one_would(text_data, tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    data = text_data()
    data.prepare()
    subprocess.run([sys.executable, script, str(tmp_path), str(Path(__file__).parent)], check=True, timeout=120)
    trained, validated = zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)), strict=True)
    wanted = [global_batch(data, step) for step in range(3)]
    assert torch.equal(torch.stack(trained, dim=1).reshape(3, 8, 17), torch.stack(wanted))
    targets = shift(torch.stack(validated, dim=1).reshape(-1, 17))[1]
    assert torch.equal(
        targets[targets != IGNORE],
        torch.tensor(data.held_out_ids[1 : 1 + targets.numel()].astype(np.int64))[: (targets != IGNORE).sum()],
    )
