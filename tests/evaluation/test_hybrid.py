"""The layers that a student had better leave to its teacher, by the divergence each saves."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.evaluation.hybrid import measure_apart, read, with_layers, without_linear
from performer_lm.model import PerformerLM
from performer_lm.objectives import kl_divergence

Section = Callable[..., dict[str, Any]]
Invoke = Callable[..., tuple[int, str, str]]
DATA = ["data=files", "data.path=text.txt", "data.context=32", "device=cpu"]


@pytest.fixture
def teacher(model_section: Section) -> PerformerLM:
    """Return a model of three layers with softmax, of which the second has by far the longest keys."""
    model: PerformerLM = checkpoint.build(section(model_section, "attn=flash"))
    for name, parameter in model.named_parameters():
        std = 0.6 if "layers.1.attention.body.project_in" in name else 0.1
        nn.init.normal_(parameter, mean=float(name.endswith("gain")), std=std)
    return model.eval()


def section(model_section: Section, *words: str) -> dict[str, Any]:
    return model_section(*words, "model=transformer", "model.depth=3", vocab_size=257)


def write(model: PerformerLM, described: dict[str, Any]) -> None:
    content = checkpoint.describe(model=described, tokenizer=ByteTokenizer(), fingerprint={}, seed=0)
    weights = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    Path("runs/a").mkdir(parents=True)
    checkpoint.save({"performer_lm": content, "state_dict": weights, "global_step": 0}, Path("runs/a/best.ckpt"))


@torch.no_grad()
def test_with_all_layers_restored_a_student_is_its_teacher(teacher: PerformerLM, model_section: Section) -> None:
    student: PerformerLM = checkpoint.build(section(model_section, "attn=favor", "attn.num_features=4")).eval()
    checkpoint.load_weights(student, teacher.state_dict(), source="teacher")
    windows = [torch.randint(0, 256, (2, 17)), torch.randint(0, 256, (1, 17))]
    lengths, known = torch.ones(257, dtype=torch.int64), read(teacher, windows, separator=None)

    def divergence(*restored: int) -> float:
        with with_layers(student, teacher, restored):
            return measure_apart(student, teacher, windows, known, lengths, separator=None).divergence

    wanted = [kl_divergence(teacher(ids[:, :-1]), student(ids[:, :-1])).flatten() for ids in windows]
    assert divergence() == pytest.approx(float(torch.cat(wanted).mean()), rel=1e-4)
    assert divergence(0, 1, 2) == pytest.approx(0.0, abs=1e-7)
    assert divergence() > divergence(1)


STUDENTS = {
    "favor": (["attn=favor"], "favor", []),
    "features": (
        ["attn=favor", "attn/features=learned", "attn.num_features=8", "attn.features.centred=true"],
        "favor",
        [
            "attn/features@attn.backends.favor.features=learned",
            "attn.backends.favor.num_features=8",
            "attn.backends.favor.features.centred=true",
        ],
    ),
    "another kernel": (["attn=relu"], "relu", []),
    "linear": (["attn=linear"], "linear", []),
}


@pytest.mark.parametrize(("words", "name", "options"), STUDENTS.values(), ids=STUDENTS)
def test_the_layer_that_softmax_matters_most_to_is_kept_in_a_pattern_to_be_typed(
    words: list[str],
    name: str,
    options: list[str],
    teacher: PerformerLM,
    model_section: Section,
    invoke: Invoke,
    text: None,
) -> None:
    write(teacher, section(model_section, "attn=flash"))
    code, out, err = invoke("ckpt=runs/a", *words, "task=hybrid", *DATA, "task.keep=0.3", script="evaluate.py")
    assert code == 0, err
    assert re.findall(r"layer (\d)", out)[0] == "1"
    pattern = out.splitlines()[-1].split()
    assert sorted(pattern) == sorted(["attn=hybrid", f"attn.pattern=[{name},flash,{name}]", *options])
    assert next(float(saved) for saved in re.findall(r"([+-]\d\.\d+) saved", out)) > 0
    planned, student = (checkpoint.build(section(model_section, *each)) for each in (pattern, words))
    assert checkpoint.other_attention(planned, teacher) == [0, 2]
    assert checkpoint.other_attention(planned, student) == [1]


def test_a_model_is_no_student_of_itself(
    teacher: PerformerLM, model_section: Section, invoke: Invoke, text: None
) -> None:
    write(teacher, section(model_section, "attn=flash"))
    for words in ([], ["attn=hybrid", "attn.pattern=[flash]"]):
        code, out, err = invoke("ckpt=runs/a", *words, "task=hybrid", *DATA, script="evaluate.py")
        assert (code, out) == (2, "")
        assert "error: the model attends in all layers as task.teacher=" in err


@torch.no_grad()
def test_without_linear_attention_other_heads_go_on(model_section: Section) -> None:
    words = ["attn=hybrid", "attn.pattern=[favor,flash,delta]", "model.local_heads=1"]
    model: PerformerLM = checkpoint.build(section(model_section, *words)).eval()
    ids, found = torch.randint(0, 256, (1, 9)), {}
    for name, part in model.named_modules():
        if name.endswith(("everywhere", "nearby")):
            part.register_forward_hook(lambda _, given, out, name=name: found.update({name: bool(out.any())}))
    with without_linear(model):
        model(ids)
    assert [name for name, alive in found.items() if not alive] == [
        f"performer.layers.{layer}.attention.body.backend.everywhere" for layer in (0, 2)
    ]
    model(ids)
    assert all(found.values())
