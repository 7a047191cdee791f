"""Nothing is built before its size, its kind and its vocabulary are found in the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer, CharacterTokenizer

Content = dict[str, Any]
Section = Callable[..., dict[str, Any]]
UNFIT = r"a\.ckpt does not fit the model: "


def part(name: str) -> dict[str, Any]:
    return {"_target_": f"performer_lm.{name}", "_partial_": True}


def opened(content: Content, **options: Any) -> Any:
    checkpoint.save(content, Path("a.ckpt"))
    return checkpoint.open_model(checkpoint.read(Path("a.ckpt")), **options)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("depth", 10**9, "depth is 1,000,000,000, and the file holds 16 tensors"),
        ("depth", 17, "depth is 17, and the file holds 16 tensors"),
        ("depth", -1, ""),
        ("depth", 2.5, ""),
        ("depth", "x", ""),
        ("dim", 0, ""),
        ("dim", None, ""),
        ("heads", 0, ""),
        ("heads", 3, ""),
        ("heads", [4], ""),
        ("vocab_size", 10**12, "vocab_size is 1,000,000,000,000, and the file"),
        ("vocab_size", 258, ""),
        ("vocab_size", {}, ""),
        ("convolution", 10**11, "convolution is"),
        (
            "local",
            {"_target_": "performer_lm.attention.local.LocalAttention", "_partial_": True, "window": 10**9},
            "win",
        ),
        (
            "absolute",
            {"_target_": "performer_lm.nn.positions.LearnedPositions", "_partial_": True, "max_len": 99},
            "it h",
        ),
        ("attn", None, ""),
        ("attn", part("attention.favor.FavorAttention"), ""),
        ("norm", {**part("nn.norm.RMSNorm"), "eps": "x"}, ""),
        ("norm", {"_target_": "performer_lm.nn.\0.RMSNorm"}, "'performer_lm.nn.\\\\x00.RMSNorm' is not a model class"),
        ("norm", {"_target_": ["performer_lm.nn.norm.RMSNorm"]}, r".*\] is not a model class"),
        ("more", 1, ""),
        ("_target_", "performer_lm.performer.Performer", ""),
        ("_target_", "performer_lm.nn.norm.NoNorm", ""),
        ("_target_", NotImplemented, "None is not a model class"),
    ],
)
def test_a_description_that_is_none_is_one_line(key: str, value: Any, message: str, content: Content) -> None:
    content["performer_lm"]["model"][key] = None if value is NotImplemented else value
    with pytest.raises(ValueError, match=UNFIT + message) as caught:
        opened(content)
    assert len(str(caught.value).splitlines()) == 1


WIDE = {"dim": 1, "heads": 1, "depth": 1, "gate": False, "decay": False, "convolution": 0}


@pytest.mark.parametrize("features", ["learned", "taylor2", "identity", "positive", "hyperbolic"])
@pytest.mark.parametrize("asked", [False, True])
def test_what_is_drawn_for_wide_heads_is_bounded_by_the_file(
    features: str, asked: bool, model_section: Section, content: Content
) -> None:
    """A head of width d takes 4 d weights beside a stream of width 1, and d^2 numbers to draw its projection."""
    chosen = ["attn=linear"] if features == "identity" else [f"attn/features={features}", "attn.num_features=4"]
    chosen = chosen if features != "positive" else ["attn=favor", "attn.num_features=4"]
    wide = {"dim_head": 50_000, "key_heads": 1, **WIDE}
    attn = model_section(*(["attn=exact"] if asked else chosen))["attn"]
    section = {**content["performer_lm"]["model"], **wide, "attn": attn}
    with torch.device("meta"):
        names = {
            name: value for name, value in checkpoint.build(section).state_dict().items() if ".backend." not in name
        }
    content["state_dict"] = {f"model.{name}": torch.zeros(value.shape) for name, value in names.items()}
    content["performer_lm"]["model"] = section
    with pytest.raises(ValueError, match=UNFIT + r"it describes [\d,]+ numbers, and the file holds [\d,]+"):
        opened(content, attn=model_section(*chosen)["attn"] if asked else None)


def test_the_state_that_it_decodes_with_is_bounded(model_section: Section, content: Content) -> None:
    section = {**content["performer_lm"]["model"], "attn": model_section("attn=local", "attn.window=1000000")["attn"]}
    section |= {"dim_head": 512, "heads": 1}
    with torch.device("meta"):
        names = checkpoint.build(section).state_dict()
    content["state_dict"] = {f"model.{name}": torch.zeros(value.shape) for name, value in names.items()}
    content["performer_lm"]["model"] = section
    with pytest.raises(ValueError, match=UNFIT + r"it describes 1,0\d\d,\d+,\d+ numbers, and the file holds"):
        opened(content)


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(specials=["mask"]), CharacterTokenizer(alphabet="ab", fallback=False)]
)
def test_the_vocabulary_is_the_models(tokenizer: Any, content: Content) -> None:
    content["performer_lm"]["tokenizer"] = tokenizer.to_dict()
    with pytest.raises(ValueError, match=UNFIT + rf"the tokenizer has {tokenizer.vocab_size} ids, the model 257"):
        opened(content)


def test_a_tokenizer_that_is_none_names_the_file(content: Content) -> None:
    content["performer_lm"]["tokenizer"] = {"kind": "os.system"}
    with pytest.raises(ValueError, match=r"^a\.ckpt: tokenizer data: kind \('os\.system'\) must be one of"):
        opened(content)


def test_weights_are_numbers_of_the_models_kind(content: Content) -> None:
    content["state_dict"]["model.head.weight"] = content["state_dict"]["model.head.weight"].to(torch.int8)
    with pytest.raises(
        ValueError, match=UNFIT + r"head\.weight holds torch\.int8 in the file, torch\.float32 in the model"
    ):
        opened(content)


@pytest.mark.parametrize(
    "objective", ["x", [1], {"_target_": ["a"]}, {"_target_": 3}, {"_target_": "performer_lm.objectives.NextToken"}]
)
def test_an_objective_that_is_none_is_one_line(objective: Any, content: Content) -> None:
    if isinstance(objective, dict):
        objective["chunk_size"] = "many"
    content["performer_lm"]["training"] = {"objective": objective}
    checkpoint.save(content, Path("a.ckpt"))
    read = checkpoint.read(Path("a.ckpt"))
    with pytest.raises(ValueError, match=r"^a\.ckpt") as caught:
        checkpoint.open_objective(read, *checkpoint.open_model(read))
    assert len(str(caught.value).splitlines()) == 1
