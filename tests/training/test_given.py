import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf

from performer_lm import checkpoint
from performer_lm.checkpoint import Checkpoint
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.run import Run

Start = Callable[..., Run]
LAST = "checkpoints/last.ckpt"
GOLDEN = Path(__file__).parents[1] / "golden" / "backends"


def saved(run: str) -> Checkpoint:
    return checkpoint.read(Path(run) / LAST)


def record(run: str) -> list[dict[str, float]]:
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in rows]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "given"


@pytest.fixture
def given(start: Start, kept: Path) -> str:
    """Return a run folder whose best checkpoint is not its last, and holds averages of the weights."""
    if kept.exists():
        shutil.copytree(kept, "runs/given", symlinks=True)
        Path("runs/latest").symlink_to("given")
        return "runs/given"
    start(
        "model.dim=24", "attn=favor", "tokenizer=characters", "callbacks.ema.decay=0.9", "seed=3", "run_dir=runs/given"
    ).fit()
    best = next(path for path in Path("runs/given/checkpoints").glob("step=000002*.ckpt"))
    checkpoint.point(Path("runs/given/checkpoints/best.ckpt"), best)
    shutil.copytree("runs/given", kept, symlinks=True)
    return "runs/given"


class InterruptAt(Callback):
    """Presses Ctrl-C as a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1:
            signal.raise_signal(signal.SIGINT)


def test_a_run_starts_from_the_weights_that_generate_uses(start: Start, given: str) -> None:
    run = start(f"init={given}", "run_dir=runs/a")
    model, tokenizer = checkpoint.open_model(checkpoint.read(checkpoint.find(given)))
    assert equal(run.task.model.state_dict(), model.state_dict())  # though model.dim and tokenizer= are not typed
    assert run.data.tokenizer.to_dict() == tokenizer.to_dict()
    run.fit()
    [first, *_] = record("runs/a")
    assert first["step"] == 1
    assert saved("runs/a").content["global_step"] == 4
    assert "the averages of the weights at step 2" in Path("runs/a/train.log").read_text()
    config = OmegaConf.load("runs/a/config.yaml")
    assert (config.init, config.model.dim) == (given, 24)
    assert saved("runs/a").section["init"] == given


def test_a_file_latest_and_a_file_without_a_run_are_taken_alike(start: Start, given: str) -> None:
    best = (Path(given) / "checkpoints/best.ckpt").resolve()
    shutil.copy(best, "alone.ckpt")
    for name in (str(best), "latest", "alone.ckpt", "runs/latest"):
        run = start(f"init='{name}'", "run_dir=runs/a")
        assert run.task.model.performer.layers[0].attention.body.project_in.weight.shape[1] == 24
        run.run_folder.release()


@pytest.mark.parametrize("typed", ["attn=exact", "attn=flash", "attn=local", "attn=hybrid", "attn=relu"])
def test_any_backend_may_go_on_with_the_weights(start: Start, given: str, typed: str) -> None:
    options = ["attn.window=8"] if typed == "attn=local" else []
    options += ["attn.pattern=[favor,exact]"] if typed == "attn=hybrid" else []
    run = start(f"init={given}", typed, *options, "run_dir=runs/a")
    theirs = checkpoint.read(checkpoint.find(given)).weights
    shared = [name for name, _ in run.task.model.named_parameters() if name in theirs]
    assert len(shared) > 10
    assert all(torch.equal(run.task.model.state_dict()[name], theirs[name]) for name in shared)
    assert math.isfinite(run.fit())
    told = "the attention backend changed" in Path("runs/a/train.log").read_text()
    assert told == (typed != "attn=relu")  # whose projections are of the same shape


def test_options_of_the_model_change_what_is_typed_alone(start: Start, given: str) -> None:
    run = start(f"init={given}", "model.dropout=0.25", "attn.num_features=8", "model.local_heads=1",
                "model.local.window=8", "run_dir=runs/a")  # fmt: skip
    section = run.task.section["model"]
    theirs = saved(given).section["model"]
    changed = {name for name in section if section[name] != theirs[name]}
    assert changed == {"dropout", "attn", "local_heads", "local"}
    assert section["attn"] == {**theirs["attn"], "num_features": 8}
    assert math.isfinite(run.fit())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("model.dim=48", r"best\.ckpt does not fit the model: size mismatch for"),
        ("model.depth=3", r"best\.ckpt does not fit the model: it has no performer\.layers\.2"),
        ("model=transformer", r"best\.ckpt does not fit the model"),
        ("tokenizer=bytes", r"ByteTokenizer \(257 ids\), and .* knows the ids of Character.*: leave tokenizer= out"),
        ("attn.num_features=0", "num_features"),
        ("model.local_heads=9", "local_heads"),
        ("init=nowhere", "init=nowhere does not exist"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_and_leaves_nothing(
    start: Start, given: str, typed: str, message: str
) -> None:
    before = set(Path("runs").rglob("*"))
    with pytest.raises(ValueError, match=message) as told:
        start(f"init={given}", typed)
    assert "\n" not in str(told.value)
    assert set(Path("runs").rglob("*")) == before


def test_options_of_another_backend_than_the_given_one_want_its_name(start: Start) -> None:
    start("attn=flash", "run_dir=runs/given").fit()
    with pytest.raises(ValueError, match=r"attn\.num_features is of DeltaAttention, .* FlashAttention: type attn="):
        start("init=runs/given", "attn.num_features=8")
    assert start("init=runs/given", "attn=favor", "attn.num_features=8").task.section["model"]["attn"]["num_features"]


def test_data_with_ids_of_their_own_are_refused(invoke: Callable[..., tuple[int, str, str]], given: str) -> None:
    code, _, err = invoke(f"init={given}", "data=synthetic")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "knows the ids of CharacterTokenizer" in err


@pytest.mark.parametrize("ckpt", ["ckpt=runs/part", "ckpt=auto"])
def test_a_run_from_given_weights_resumes_exactly_and_takes_them_once(start: Start, given: str, ckpt: str) -> None:
    common = [f"init={given}", "attn=exact", "trainer.max_steps=6", "trainer.val_every=3", "model.dropout=0.1"]
    start(*common, "run_dir=runs/whole").fit()
    part = start(*common, "run_dir=runs/part", *([ckpt] if ckpt == "ckpt=auto" else []))
    assert part.resumed is None
    part.trainer.callbacks.insert(0, InterruptAt(5))
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    shutil.rmtree(given)  # what it started from is no longer needed
    run = start(*common, ckpt, "run_dir=runs/part")
    assert run.folder.resolve() == Path("runs/part").resolve()
    run.fit()
    assert record("runs/part") == record("runs/whole")
    assert equal(saved("runs/part").weights, saved("runs/whole").weights)
    assert saved("runs/part").section["init"] == given


def test_auto_goes_on_with_the_run_that_started_from_the_same_and_with_no_other(start: Start, given: str) -> None:
    common = ["model.dim=24", "tokenizer=characters", "callbacks.ema.decay=0.9", "seed=3", "ckpt=auto"]
    assert start(*common).folder == Path(given).resolve()
    first = start(f"init={given}", *common[2:])
    assert first.resumed is None  # though the given run has the same model, data and way of training
    first.fit()
    again = start(f"init={given}", *common[2:])
    assert again.folder == first.folder.resolve()
    assert start(*common).folder == Path(given).resolve()


@pytest.mark.parametrize("name", ["learned", "local_heads", "reversible", "classic", "encoder", "seq2seq"])
def test_every_kind_of_model_starts_a_run(start: Start, name: str) -> None:
    shutil.copy(GOLDEN / f"{name}.ckpt", "given.ckpt")
    options = {"encoder": ["objective=mlm"], "seq2seq": ["objective=seq2seq"]}.get(name, [])
    text = Path("text.txt").read_text()
    Path("text.txt").write_text("".join(line for line in text.splitlines(keepends=True) if not set(line) - set(
        "".join(f"line {index} says {index}\n" for index in range(10)))))  # fmt: skip
    run = start("init=given.ckpt", *options, "attn=exact" if name == "seq2seq" else "attn.chunk_size=16")
    assert math.isfinite(run.fit())
    assert run.task.section["model"]["_target_"] == checkpoint.read(Path("given.ckpt")).section["model"]["_target_"]
