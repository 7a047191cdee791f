"""Everything that `resume.allow` may name goes on, or is refused in one line."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.training.run import Run

Start = Callable[..., Run]
LAST = "checkpoints/last.ckpt"
LONGER = ["trainer.max_steps=6", "ckpt=runs/a"]
BASE = ["optimizer=adamw", "callbacks.ema.decay=0.9", "run_dir=runs/a"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def saved(start: Start, kept: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that makes `runs/a`, trained with overrides, and returns its last checkpoint."""

    def make(*overrides: str) -> dict[str, Any]:
        folder = kept / " ".join(("run", *overrides)).replace("/", ":")
        if not folder.exists():
            start(*BASE, *overrides).fit()
            shutil.copytree("runs/a", folder, symlinks=True)
        else:
            shutil.copytree(folder, "runs/a", symlinks=True)
        return checkpoint.read(Path("runs/a") / LAST).content

    return make


def log() -> str:
    return Path("runs/a/train.log").read_text()


def momenta(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """Return the optimizer's state by the parameters' names."""
    optimizer = run.trainer.optimizers[0]
    states = {id(p): state for part in getattr(optimizer, "parts", [optimizer]) for p, state in part.state.items()}
    return {name: states.get(id(p), {}) for name, p in run.task.model.named_parameters()}


@pytest.mark.parametrize("new", ["muon", "adamw"])
def test_another_optimizer_begins_with_a_new_state_and_says_so(start: Start, new: str) -> None:
    old = {"muon": "adamw", "adamw": "muon"}[new]
    start(f"optimizer={old}", "schedule=constant", "run_dir=runs/a").fit()
    run = start(f"optimizer={new}", "schedule=constant", *LONGER, "resume.allow=[optimizer]")
    weights = checkpoint.read(Path("runs/a") / LAST).content["state_dict"]
    assert math.isfinite(run.fit())
    count = len(list(run.task.model.parameters()))
    assert f"the optimizer starts anew on {count} of {count} parameters" in log()
    assert {int(state["step"]) for state in momenta(run).values() if "step" in state} == {2}
    after = checkpoint.read(Path("runs/a") / LAST).content
    assert after["global_step"] == 6
    assert any(not torch.equal(value, after["state_dict"][name]) for name, value in weights.items())
    fresh = run.task.configure_optimizers()["optimizer"].param_groups
    assert [group["initial_lr"] for group in run.trainer.optimizers[0].param_groups] == [g["lr"] for g in fresh]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["attn=favor"], ["attn=exact"]),
        (["attn=delta"], ["attn=exact"]),
        (["attn=exact"], ["attn=favor"]),
        (["attn=favor"], ["attn=favor", "attn/features=learned"]),
        (["attn=favor", "attn/features=learned", "attn.features.centred=true"], ["attn=flash"]),
        (["attn=favor"], ["attn=favor", "attn.num_features=8"]),
        (["attn=favor", "attn/features=learned"], ["attn=favor", "attn/features=learned", "attn.num_features=8"]),
        (["attn=favor"], ["attn=hybrid", "attn.pattern=[favor,local]", "attn.backends.local.window=8"]),
    ],
    ids=" ".join,
)
def test_another_backend_leaves_all_else_as_it_was_and_says_so(
    start: Start, saved: Callable[..., dict[str, Any]], before: list[str], after: list[str]
) -> None:
    old = saved(*before)
    with pytest.raises(ValueError, match=r"model\.attn\."):
        start(*BASE[:2], *after, *LONGER)
    run = start(*BASE[:2], *after, *LONGER, "resume.allow=[model.attn]")
    loaded: dict[str, Any] = {}
    run.trainer.callbacks[-1].on_train_start = lambda *_: loaded.update(  # type: ignore[method-assign]
        weights={name: value.clone() for name, value in run.task.model.state_dict().items()},
        averages={name: value.clone() for name, value in run.task.measured.named_parameters()},
        steps={name: int(state.get("step", -1)) for name, state in momenta(run).items()},
    )
    assert math.isfinite(run.fit())
    assert "the attention backend changed" in log()
    stays = [name for name, _ in run.task.model.named_parameters() if ".backend." not in name]
    assert len(stays) > 10
    for name in stays:
        assert torch.equal(loaded["weights"][name], old["state_dict"][f"model.{name}"])
        assert torch.equal(loaded["averages"][name], old["averages"][name])
        assert loaded["steps"][name] == 4
    new = [name for name, _ in run.task.model.named_parameters() if ".backend." in name]
    assert {loaded["steps"][name] for name in new} <= {-1}  # of no step yet
    assert ("the optimizer starts anew on" in log()) == any("learned" in word for word in after)


ALLOWED = [  # a name as messages spell it, and an override that needs it
    ("fingerprint.corpus", ["data.path=other.txt"]),
    ("fingerprint.validation_fraction", ["data.validation_fraction=0.2"]),
    ("fingerprint.context", ["data.context=32"]),
    ("fingerprint.batch_size", ["data.batch_size=8"]),
    ("fingerprint.documents", ["data.documents=packed"]),
    ("fingerprint.accumulation", ["trainer.accumulate_grad_batches=2"]),
    ("seed,fingerprint.seed,model.attn.seed", ["seed=7"]),
    ("objective", ["objective.chunk_size=16", "objective=clm"]),
    ("optimizer.lr", ["optimizer.lr=0.001"]),
    ("optimizer.betas", ["optimizer.betas=[0.5,0.9]"]),
    ("optimizer.fused", ["optimizer.fused=false"]),
    ("schedule", ["schedule=wsd"]),
    ("model.tie_embeddings", ["model.tie_embeddings=true"]),
    ("model.dropout", ["model.dropout=0.1"]),
    ("model.local_heads,model.local", ["model.local_heads=1", "model.local.window=8"]),
    ("trainer.precision", ["trainer.precision=bf16-mixed"]),
    ("trainer.precision", ["trainer.precision=bf16-true"]),
    ("trainer.gradient_clip_val", ["trainer.gradient_clip_val=null"]),
    ("callbacks.ema.decay", ["callbacks.ema.decay=0.5"]),
    ("callbacks.ema.decay", ["~callbacks.ema"]),
]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of norms in bfloat16
@pytest.mark.parametrize(("name", "typed"), ALLOWED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_allowed_by_name_goes_on(
    start: Start, saved: Callable[..., dict[str, Any]], name: str, typed: list[str]
) -> None:
    saved()
    Path("other.txt").write_text("".join(f"number {index}\n" for index in range(2000)))
    base = BASE[:1] if name == "callbacks.ema.decay" else BASE[:2]
    if name != "objective":
        with pytest.raises(ValueError, match=rf"belongs to another run: .*{name.split(',')[0]}"):
            start(*base, *typed, *LONGER)
    run = start(*base, *typed, *LONGER, f"resume.allow=[{name}]")
    assert math.isfinite(run.fit())
    assert checkpoint.read(Path("runs/a") / LAST).content["global_step"] == 6


@pytest.mark.parametrize("typed", ["model.depth=1", "model.dim=48", "model.convolution=0", "model=transformer"])
def test_another_model_is_refused_in_one_line_though_it_was_allowed(
    start: Start, saved: Callable[..., dict[str, Any]], typed: str
) -> None:
    saved()
    with pytest.raises(ValueError, match=r"last\.ckpt does not fit the model: ") as told:
        start(*BASE[:2], typed, *LONGER, "resume.allow=[model]")
    assert "\n" not in str(told.value)


def test_a_checkpoint_without_training_says_how_to_start_from_it(start: Start) -> None:
    start("run_dir=runs/a").fit()
    last = (Path("runs/a") / LAST).resolve()
    content = checkpoint.read(last).content
    for name in ("loops", "optimizer_states", "callbacks", "lr_schedulers"):
        checkpoint.save({key: value for key, value in content.items() if key != name}, last)
        with pytest.raises(ValueError, match=rf"it has no {name}; .*: init=runs/a/checkpoints/last\.ckpt"):
            start(*LONGER)
    assert math.isfinite(start("init=runs/a/checkpoints/last.ckpt", "run_dir=runs/b").fit())
