"""bfloat16 for the products, float32 for what is summed, kept and learned."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from performer_lm.attention.favor import FavorAttention
from performer_lm.nn.mixing import LogDecay
from performer_lm.objectives import NextToken
from performer_lm.performer import Performer
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.precision import choose_precision
from performer_lm.training.run import Run


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
