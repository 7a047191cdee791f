"""`export.py` as it is typed, on the checkpoint of a tiny model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.interop.export.folder import FILES

ROOT = Path(__file__).parents[1]
Invoke = Callable[..., tuple[int, str, str]]
TINY = ["model.dim=16", "model.depth=1", "model.heads=2"]


def save(path: Path, section: dict[str, Any]) -> None:
    model = checkpoint.build(section)
    own = checkpoint.describe(model=section, tokenizer=ByteTokenizer(), fingerprint={}, seed=0)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    checkpoint.save({"performer_lm": own, "state_dict": weights, "global_step": 12}, path)


@pytest.fixture
def export(invoke: Invoke, model_section: Callable[..., dict[str, Any]]) -> Invoke:
    """Return a function that runs `export.py` where `runs/a` holds a run of 12 steps."""
    section = model_section(vocab_size=257, tiny=TINY)
    save(Path("runs/a/checkpoints/step=000012-val_bpb=2.345.ckpt"), section)
    checkpoint.point(Path("runs/a/checkpoints/best.ckpt"), Path("step=000012-val_bpb=2.345.ckpt"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=["data=files", "data.path=my words.txt", "data.context=64"])
    Path("runs/a/config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return lambda *words: invoke(*words, script="export.py")


def left() -> list[str]:
    return sorted(os.listdir())


def test_a_run_is_exported_with_what_is_known_of_its_training(export: Invoke) -> None:
    code, out, err = export("ckpt=runs/a", "out=made/exported")
    assert (code, err) == (0, "")
    assert 'from_pretrained("made/exported", trust_remote_code=True) opens a PerformerForCausalLM' in out
    folder = Path("made/exported")
    assert {path.name for path in folder.iterdir()} == FILES
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention"]
    assert config["max_position_embeddings"] == 64
    card = (folder / "README.md").read_text()
    for wanted in (
        "license: unknown  # fill in",
        "| steps | 12 |",
        "| 3,072 |",
        "| 2.345 |",
        '"my words.txt"',
        "PerformerLM",
    ):
        assert wanted in card, wanted
    assert left() == ["made", "runs"]


def test_a_file_alone_is_exported_and_takes_the_place_of_an_earlier_export(
    export: Invoke, model_section: Callable[..., dict[str, Any]]
) -> None:
    assert export("ckpt=runs/a", "out=x")[0] == 0
    plain = ["model=transformer", "attn=flash", "model.feed_forward.activation=silu", "model.feed_forward.gated=true"]
    save(Path("a.ckpt"), model_section(*plain, vocab_size=257, tiny=TINY))
    code, out, err = export("ckpt=a.ckpt", "out=x")
    assert (code, err) == (0, "")
    assert 'from_pretrained("x") opens a LlamaForCausalLM' in out
    assert "| not recorded |" in Path("x/README.md").read_text()
    assert not Path("x/modeling_performer.py").exists()
    assert left() == ["a.ckpt", "a.ckpt.sha256", "runs", "x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=."], "out=. holds runs, which is of no earlier export: give the name of a new folder"),
        (["out=runs/a/config.yaml"], "out=runs/a/config.yaml is a file: give the name of a folder"),
        (["push=true"], "push=true and repo=NAME/MODEL go together: give both or none"),
        (["repo=a/b"], "push=true and repo=NAME/MODEL go together: give both or none"),
        (["ckpt=nope"], "ckpt=nope does not exist"),
        (["out=runs/a/config.yaml/x"], "runs/a/config.yaml: file exists"),
        (["outt=x"], "outt: unknown key; did you mean out?"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line_and_nothing_is_written(
    export: Invoke, words: list[str], message: str
) -> None:
    typed = {word.partition("=")[0] for word in words}
    code, out, err = export(*(f"{k}={v}" for k, v in {"ckpt": "runs/a", "out": "x"}.items() if k not in typed), *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert left() == ["runs"]


def test_a_model_of_another_kind_is_refused_by_name(
    export: Invoke, model_section: Callable[..., dict[str, Any]]
) -> None:
    save(Path("a.ckpt"), model_section("model=performer_encoder", vocab_size=257, tiny=TINY))
    code, _, err = export("ckpt=a.ckpt", "out=x")
    assert code == 2
    assert err == (
        "error: the model is an encoder (causal=false), and export.py writes causal language models, such as "
        "model=performer\n"
    )
    assert not Path("x").exists()


def test_push_calls_the_client_of_the_hub_and_nothing_else(export: Invoke) -> None:
    with patch("huggingface_hub.HfApi") as client:
        client.return_value.upload_folder.return_value = "https://huggingface.co/me/mine/tree/main"
        code, out, err = export("ckpt=runs/a", "out=x", "push=true", "repo=me/mine", "private=false")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == ["https://huggingface.co/me/mine/tree/main"]
    client.return_value.create_repo.assert_called_once_with("me/mine", private=False, exist_ok=True)
    client.return_value.upload_folder.assert_called_once_with(folder_path=Path("x"), repo_id="me/mine")


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(export: Invoke) -> None:
    code, _, err = export("ckpt=runs/a", "out=x", "push=true", "repo=me/mine")  # tests run offline
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
