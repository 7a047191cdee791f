"""What a hostile checkpoint or command line could try (RELIABILITY: fact 9, C24-C29)."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from omegaconf import OmegaConf

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer

BYPASSES = [  # names that Hydra's own block list lets through
    ("pandas.read_pickle", {"filepath_or_buffer": "payload.pkl"}),
    ("numpy.load", {"file": "payload.pkl", "allow_pickle": True}),
    ("torch.load", {"f": "payload.pkl", "weights_only": False}),
    ("builtins.open", {"file": "marker", "mode": "w"}),
    ("pathlib.Path.write_text", {"self": "marker", "data": "x"}),
    ("shutil.copy", {"src": "payload.pkl", "dst": "marker"}),
    ("performer_lm.checkpoint.shutil.copy", {"src": "payload.pkl", "dst": "marker"}),
    ("performer_lm.checkpoint.files.shutil.copyfile", {"src": "payload.pkl", "dst": "marker"}),
    ("performer_lm.training.lock.os.remove", {"path": "payload.pkl"}),
    ("performer_lm.checkpoint.files.remove", {"path": "payload.pkl"}),
]
Invoke = Callable[..., tuple[int, str, str]]
Section = Callable[..., dict[str, Any]]


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("marker"),))


@pytest.fixture(autouse=True)
def _payload(text: None) -> None:
    Path("payload.pkl").write_bytes(pickle.dumps(Payload()))


def write(section: dict[str, Any], **more: Any) -> Path:
    described = checkpoint.describe(model=section, tokenizer=ByteTokenizer(), fingerprint={}, seed=0)
    content = {
        "state_dict": {f"model.{index}": torch.zeros(3) for index in range(50)},
        "performer_lm": {**described, **more},
        "global_step": 0,
    }
    checkpoint.save(content, Path("a.ckpt"))
    return Path("a.ckpt")


def untouched() -> bool:
    return not Path("marker").exists() and Path("payload.pkl").exists()


@pytest.mark.parametrize(("target", "values"), BYPASSES, ids=[target for target, _ in BYPASSES])
def test_no_name_in_a_checkpoint_is_run(target: str, values: dict[str, Any], model_section: Section) -> None:
    section = model_section(vocab_size=257)
    for hostile in ({"_target_": target, **values}, {**section, "norm": {"_target_": target, **values}}):
        with pytest.raises(ValueError, match="is not a model class of performer_lm"):
            checkpoint.open_model(checkpoint.read(write(hostile)))
    assert untouched()


@pytest.mark.parametrize(("target", "values"), BYPASSES, ids=[target for target, _ in BYPASSES])
def test_no_name_on_a_command_line_is_run(target: str, values: dict[str, Any], invoke: Invoke) -> None:
    words = [f"++optimizer.{key}={value}" for key, value in values.items()]
    code, _, err = invoke(f"optimizer._target_={target}", *words, "data=files", "data.path=text.txt")
    assert code == 2
    assert "may not be built from a config" in err or "no module" in err
    assert untouched()


@pytest.mark.parametrize(
    "section",
    [
        "job: {env_set: {PYTHONPATH: evil}}",
        "job_logging: {handlers: {a: {(): pathlib.Path.touch, self: marker}}, version: 1}",
        "callbacks: {a: {_target_: pathlib.Path.touch, self: marker}}",
        "launcher: {_target_: pathlib.Path.touch}",
        "{mode: MULTIRUN, sweeper: {params: {+hydra.job.env_set.PYTHONPATH: evil}}}",
        "searchpath: ['pkg://evil']",
    ],
)
@pytest.mark.parametrize("multirun", [[], ["-m"]], ids=["run", "sweep"])
def test_no_config_file_of_a_stranger_runs_code(section: str, multirun: list[str], invoke: Invoke) -> None:
    """Among others that of a worker process, which starts Python anew and with it a `sitecustomize` on its path."""
    Path("evil/experiment").mkdir(parents=True)
    Path("evil/sitecustomize.py").write_text(f"open({str(Path('marker').absolute())!r}, 'w')")
    Path("evil/__init__.py").write_text("open('marker', 'w')")
    Path("evil/experiment/evil.yaml").write_text(f"# @package _global_\nhydra:\n  {section}\n")
    words = ["debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes", "data.num_workers=1"]
    code, out, err = invoke(*multirun, "--config-dir=evil", "experiment=evil", *words, "data.start_method=spawn")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "hydra" in err
    assert untouched()
    assert not Path("runs").exists()


@pytest.mark.parametrize("force", ["0", "1"])
@pytest.mark.parametrize("where", ["optimizer_states", "hyper_parameters", "callbacks", "performer_lm"])
def test_no_pickle_is_run(force: str, where: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    torch.save({"state_dict": {}, "performer_lm": {"format": 1}, where: Payload()}, "a.ckpt")
    for script in ("generate.py", "evaluate.py", "serve.py", "train.py"):
        code, _, err = invoke("ckpt=a.ckpt", script=script)
        assert (code, len([line for line in err.splitlines() if line.startswith("error:")])) == (2, 1)
        assert "a.ckpt is not a checkpoint of performer_lm" in err
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.peek(Path("a.ckpt"))
    assert untouched()


def test_no_interpolation_in_a_checkpoint_is_resolved(model_section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hush")
    section = {**model_section(vocab_size=257), "dim": "${oc.env:SECRET}"}
    with pytest.raises(ValueError, match="its config holds an interpolation"):
        checkpoint.read(write(section))
    with pytest.raises(ValueError, match="its seed is"):
        checkpoint.read(write(model_section(vocab_size=257), seed="${oc.env:SECRET}"))


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 10**12), ("depth", 10**9), ("dim", 4 * 10**8), ("convolution", 10**11)]
)
def test_declared_sizes_are_held_against_the_file_before_memory_is_asked_for(
    key: str, value: int, model_section: Section
) -> None:
    with pytest.raises(ValueError, match=r"a\.ckpt does not fit the model"):
        checkpoint.open_model(checkpoint.read(write({**model_section(vocab_size=257), key: value})))


def test_a_config_nested_without_end_is_refused(model_section: Section) -> None:
    nested: Any = {}
    for _ in range(200):
        nested = {"a": nested}
    with pytest.raises(ValueError, match="nested too deeply"):
        checkpoint.read(write({**model_section(vocab_size=257), "norm": nested}))


@pytest.mark.parametrize("name", ["http://host/a.ckpt", "s3://bucket/a.ckpt", "file:///a.ckpt"])
def test_checkpoints_are_of_this_machine(name: str, invoke: Invoke) -> None:
    for script in ("train.py", "generate.py"):
        code, _, err = invoke(f"ckpt={name}", script=script)
        assert code == 2
        assert "is not opened from elsewhere" in err


def test_names_of_the_environment_are_in_no_artefact(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(wandb.teardown)  # it remembers a key for as long as a process lives
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cr3t" * 7)
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes", "logger=[wandb,tensorboard]"]
    code, _, err = invoke(*words, "run_dir=runs/a")
    assert code == 0, err
    written = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert [path for path in written if b"s3cr3t" in path.read_bytes()] == []
    assert "oc.env" not in str(OmegaConf.load("runs/a/config.yaml"))
    assert "s3cr3t" in os.environ["HF_TOKEN"]
