from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.performer import Performer
from performer_lm.training import compile as compiling
from performer_lm.training.compile import check_compiler, compile_stacks
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it loads its compiler
def test_the_stacks_are_compiled_and_names_stay(
    lively_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "check_compiler", lambda device: None)
    model = lively_model()
    names = list(model.state_dict())
    compile_stacks(model, device=torch.device("cpu"))
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert [type(module) for module in compiled] == [Performer]
    assert list(model.state_dict()) == names


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: object) -> object:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(
        ValueError, match=r"compile=true needs a compiler for cpu.*: InvalidCxxCompiler: No working C\+\+ com"
    ):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("attn", ["favor", "flash"])
def test_a_compiled_run_learns_as_another_does(start: Callable[..., Run], attn: str) -> None:
    common = [f"attn={attn}", "optimizer=adamw", "model.depth=1", "callbacks.ema.decay=0.9", "objective.chunk_size=100"]
    for run, more in {"plain": [], "compiled": ["compile=true"]}.items():
        start(*common, *more, f"run_dir=runs/{run}").fit()
    files = [checkpoint.read(Path(f"runs/{run}/checkpoints/last.ckpt")) for run in ("plain", "compiled")]
    assert list(files[0].weights) == list(files[1].weights)
    plain, compiled = (read_metrics(Path(f"runs/{run}/metrics.jsonl")) for run in ("plain", "compiled"))
    for name in ("train/loss", "val/bpb"):
        values = [[row[name] for row in rows if name in row] for rows in (plain, compiled)]
        assert values[1] == pytest.approx(values[0], rel=1e-3)
    resumed = start(*common, "compile=true", "ckpt=runs/compiled", "trainer.max_steps=6")
    resumed.fit()
    assert resumed.trainer.global_step == 6
    with pytest.raises(ValueError, match=r"compile was True, is False"):
        start(*common, "ckpt=runs/compiled", "trainer.max_steps=8")
