"""bfloat16 for the products, float32 for what is summed, kept and learned."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from performer_lm.attention.favor import FavorAttention
from performer_lm.evaluation.perplexity import measure_perplexity
from performer_lm.evaluation.scoring import score_windows
from performer_lm.nn.mixing import LogDecay
from performer_lm.objectives import Losses, NextToken
from performer_lm.performer import Performer
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run
from performer_lm.training.trainer import choose_precision


@pytest.mark.parametrize(
    ("asked", "found", "wanted"),
    [
        ("auto", {"avx512_bf16": True, "amx_bf16": False}, "bf16-mixed"),
        ("auto", {"avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
        ("auto", {"avx512_bf16": False, "amx_bf16": False}, "32-true"),
        ("auto", {"sve": True}, "32-true"),
        ("64-true", {"avx512_bf16": True}, "64-true"),
    ],
)
def test_a_processor_that_multiplies_bfloat16_does(
    monkeypatch: pytest.MonkeyPatch, asked: str, found: dict[str, bool], wanted: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert choose_precision(asked, accelerator="cpu") == wanted


def losses(run: str) -> list[float]:
    return [row["train/loss"] for row in read_metrics(Path(f"runs/{run}/metrics.jsonl")) if "train/loss" in row]


def leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(item)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_mixed_run_learns_as_a_float32_one_does_clipped_and_fused(start: Callable[..., Run], optimizer: str) -> None:
    common = [f"optimizer={optimizer}", "optimizer.fused=true", "trainer.gradient_clip_val=0.5", "trainer.max_steps=20"]
    for precision in ("32-true", "bf16-mixed"):
        run = start(*common, f"trainer.precision={precision}", "trainer.val_every=20", f"run_dir=runs/{precision}")
        run.fit()
    assert losses("32-true")[-1] < 0.8 * losses("32-true")[0]
    assert losses("bf16-mixed") == pytest.approx(losses("32-true"), rel=0.02)
    kept = [*run.task.parameters(), *leaves(run.trainer.optimizers[0].state_dict())]
    assert len(kept) > 2 * len(list(run.task.parameters()))
    assert {value.dtype for value in kept} == {torch.float32}


def test_statistics_are_float32_under_autocast(lively_model: Callable[..., Any]) -> None:
    model = lively_model("attn=favor").float()
    seen: dict[type[nn.Module], set[torch.dtype]] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], out: Any) -> None:
        seen.setdefault(type(module), set()).update(value.dtype for value in leaves((arguments, out)))

    for module in model.modules():
        if isinstance(module, FavorAttention | LogDecay | Performer):
            module.register_forward_hook(note)
    windows = torch.randint(0, 40, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        for chunk_size in (None, 4):
            assert NextToken(chunk_size=chunk_size)(model, windows, step=0).nats.dtype == torch.float32
        _, state = model.extend(windows, model.init_state(2))
    assert torch.bfloat16 in seen[FavorAttention]  # q, k and v: the products that autocast is for
    assert seen[LogDecay] == {torch.float32}
    assert seen[Performer] == {torch.float32}  # the stream
    sums = [branch.body.backend for branch in state.branches if branch.body is not None]
    assert [value.dtype for value in leaves(sums)] == 2 * [torch.float32, torch.float64]  # sums, exponents; two layers


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("32-true", "bf16-mixed", "16-true", "64-true")]
LONG = [
    *("data.validation_fraction=0.4", "data.validation_bytes=8192", "data.context=32", "model.depth=1", "model.dim=16"),
    *("~callbacks.samples", "trainer.log_every=1", "trainer.max_steps=2", "run_dir=runs/a"),
]


class Noted(Callback):
    """Keeps the losses that the objective gives, and the gradients before they are clipped."""

    def __init__(self, run: Run) -> None:
        self.trained: list[list[Losses]] = []
        self.validated: list[Losses] = []
        self.norms: list[float] = []
        given = type(run.task.objective).__call__

        def noting(objective: Any, model: Any, windows: Tensor, *, step: int | None, **options: Any) -> Losses:
            losses = given(objective, model, windows, step=step, **options)
            (self.validated if step is None else self.trained[-1]).append(losses)
            return losses

        run.task.objective.__class__ = type("Noting", (type(run.task.objective),), {"__call__": noting})
        run.trainer.callbacks.append(self)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.trained.append([])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [value.grad.double() for value in pl_module.parameters() if value.grad is not None]
        self.norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))


def mean(losses: list[Losses]) -> float:
    nats = sum(float(each.nats.detach().double().sum()) for each in losses)
    return nats / sum(int((each.targets >= 0).sum()) for each in losses)


@pytest.mark.parametrize("precision", ["bf16-true", *SLOW])
def test_what_is_reported_is_summed_in_full_whatever_the_precision(start: Callable[..., Run], precision: str) -> None:
    run = start(f"trainer.precision={precision}", *LONG, "trainer.val_every=1", "trainer.accumulate_grad_batches=2")
    noted = Noted(run)
    run.fit()
    rows = read_metrics(Path("runs/a/metrics.jsonl"))
    assert len(noted.validated) >= 128
    half = len(noted.validated) // 2  # there are two validations
    for found, expected in (
        (
            [row["val/loss"] for row in rows if "val/loss" in row],
            [*map(mean, (noted.validated[:half], noted.validated[half:]))],
        ),
        ([row["train/loss"] for row in rows if "train/loss" in row], [*map(mean, noted.trained)]),
        ([row["train/grad_norm"] for row in rows if "train/grad_norm" in row], noted.norms),
    ):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_validation_finds_what_evaluation_finds(start: Callable[..., Run], precision: str) -> None:
    run = start(f"trainer.precision={precision}", *LONG)
    run.fit()
    windows: Any = run.data.val_dataloader().dataset._windows  # type: ignore[attr-defined]
    with run.trainer.precision_plugin.forward_context():
        found = measure_perplexity(
            score_windows(run.task.measured, windows, objective=run.task.objective, batch_size=4),
            byte_lengths=windows.byte_lengths,
        )
    assert (
        run.saving.best
        <= float(run.trainer.callback_metrics["val/bpb"])
        == pytest.approx(found.bits_per_byte, rel=1e-4)
    )
    assert found.bytes > 8000
