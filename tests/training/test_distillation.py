"""A softmax model becomes a Performer: each stage lowers what it is to lower, moves nothing else, and resumes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.model import PerformerLM
from performer_lm.objectives import kl_divergence
from performer_lm.training.distillation import Distillation, Layerwise
from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.optim import parameter_groups
from performer_lm.training.run import Run

Start = Callable[..., Run]
Section = Callable[..., dict[str, Any]]
TEACHER = "teacher.ckpt"
STUDENT = ["attn=favor", "attn/features=learned", "attn.num_features=16", "model=transformer"]
STAGE = ["attn=favor", "attn/features=learned", "experiment=linearize", f"init={TEACHER}", "schedule.warmup=0"]


@pytest.fixture
def teacher(start: Start, model_section: Section) -> PerformerLM:
    """Return a model with softmax whose every weight does something, which also lies in `TEACHER`."""
    section = model_section("attn=flash", "model=transformer", "model.key_heads=2", vocab_size=257)
    model: PerformerLM = checkpoint.build(section)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("gain")), std=0.2)
    described = checkpoint.describe(model=section, tokenizer=ByteTokenizer(), fingerprint={}, seed=0)
    weights = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    checkpoint.save({"performer_lm": described, "state_dict": weights, "global_step": 0}, Path(TEACHER))
    return model.eval()


@pytest.fixture
def student(teacher: PerformerLM, model_section: Section) -> PerformerLM:
    """Return the teacher with attention of random features."""
    model: PerformerLM = checkpoint.build(model_section(*STUDENT, "model.key_heads=2", vocab_size=257))
    checkpoint.load_weights(model, teacher.state_dict(), source="teacher")
    return model


def windows() -> Tensor:
    return torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(1))


def learn(model: PerformerLM, objective: Any, *, steps: int) -> list[Tensor]:
    """Return the losses of steps on the same windows."""
    objective.adopt(ByteTokenizer())
    objective.join(model)
    groups = parameter_groups(model, head=model.head)
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        found = objective(model, windows(), step=step)
        objective.mean(found).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.nats.detach().mean())
    return losses


def test_layerwise_teaches_queries_keys_and_features_and_moves_nothing_else(student: PerformerLM) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    losses = learn(student, Layerwise(teacher=TEACHER, chunk_size=None), steps=25)
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    of_backends = {name for name in moved if ".backend." in name}
    assert len(of_backends) == 2
    assert moved - of_backends == {f"performer.layers.{layer}.attention.body.project_in.weight" for layer in range(2)}
    for name in moved:
        if name.endswith("project_in.weight"):
            values = slice(-2 * 8, None)  # of 2 key heads of 8 channels
            assert torch.equal(student.state_dict()[name][values], before[name][values])


@torch.no_grad()
def test_layerwise_lowers_the_error_of_every_layer(student: PerformerLM, teacher: PerformerLM) -> None:
    from performer_lm.training.distillation import Seen, _attentions, _watch, layer_error

    seen: list[Seen] = []
    hooks = [body.register_forward_hook(_watch(seen)) for body in _attentions(teacher)]
    teacher(windows()[:, :-1])
    for hook in hooks:
        hook.remove()

    def errors() -> list[float]:
        bodies = zip(_attentions(student), seen, strict=True)
        return [float(layer_error(body, each).mean()) for body, each in bodies]

    before = errors()
    with torch.enable_grad():
        losses = learn(student, Layerwise(teacher=TEACHER, chunk_size=None), steps=25)
    assert float(losses[0]) == pytest.approx(sum(before) / 2, rel=1e-4)
    assert all(after < 0.9 * error for after, error in zip(errors(), before, strict=True))


def test_distillation_lowers_the_divergence_from_the_teacher(student: PerformerLM, teacher: PerformerLM) -> None:
    def divergence() -> float:
        with torch.no_grad():
            ids = windows()[:, :-1]
            return float(kl_divergence(teacher(ids), student(ids)).mean())

    before = divergence()
    learn(student, Distillation(teacher=TEACHER, temperature=2.0, share=1.0, chunk_size=7), steps=25)
    assert divergence() < 0.8 * before


@torch.no_grad()
def test_a_student_that_is_its_teacher_has_no_divergence_and_the_share_mixes(teacher: PerformerLM) -> None:
    losses = {}
    for share in (0.0, 0.25, 1.0):
        objective = Distillation(teacher=TEACHER, temperature=3.0, share=share, chunk_size=None)
        objective.adopt(ByteTokenizer())
        losses[share] = objective(teacher, windows(), step=0).nats
        torch.testing.assert_close(objective(teacher, windows(), step=None).nats, losses[0.0])
    assert float(losses[1.0].abs().max()) < 1e-5
    torch.testing.assert_close(losses[0.25], 0.75 * losses[0.0], atol=1e-5, rtol=1e-5)


def test_chunks_change_neither_losses_nor_gradients(student: PerformerLM) -> None:
    found = []
    for chunk_size in (None, 5):
        objective = Distillation(teacher=TEACHER, temperature=2.0, share=0.5, chunk_size=chunk_size)
        objective.adopt(ByteTokenizer())
        losses = objective(student, windows(), step=0)
        student.zero_grad()
        objective.mean(losses).backward()
        found.append((losses.nats.detach(), student.head.weight.grad.clone()))  # type: ignore[union-attr]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("objective", ["layerwise", pytest.param("distill", marks=pytest.mark.slow)])
def test_a_stage_resumes_bit_for_bit(objective: str, start: Start, teacher: PerformerLM) -> None:
    words = [*STAGE, f"objective={objective}", "callbacks.samples=null"]
    start(*words, "run_dir=runs/whole", "trainer.max_steps=4").fit()  # and validates, so saves, at step 2
    half = next(Path("runs/whole/checkpoints").glob("step=000002*.ckpt"))
    Path("runs/half/checkpoints").mkdir(parents=True)
    shutil.copy(half, "runs/half/checkpoints/last.ckpt")
    start(*words, "ckpt=runs/half", "trainer.max_steps=4").fit()
    whole, again = (checkpoint.read(Path(f"runs/{name}/checkpoints/last.ckpt")) for name in ("whole", "half"))
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())
    assert (
        read_metrics(Path("runs/whole/metrics.jsonl"))[-1]["val/bpb"]
        == (read_metrics(Path("runs/half/metrics.jsonl"))[-1]["val/bpb"])
    )
    assert not [name for name in whole.content["state_dict"] if "teacher" in name]
    checkpoint.open_objective(whole, *checkpoint.open_model(whole))  # next tokens


def test_an_option_may_change_on_the_way_and_the_teacher_may_not(start: Start, teacher: PerformerLM) -> None:
    words = [*STAGE, "callbacks.samples=null", "run_dir=runs/a", "trainer.max_steps=2"]
    start(*words).fit()
    faster = start(
        *words[:-2], "ckpt=runs/a", "trainer.max_steps=4", "optimizer.lr=2e-3", "resume.allow=[optimizer.lr]"
    )
    assert not [note for note in faster.notes if "optimizer starts anew" in note]
    faster.run_folder.release()
    content = checkpoint.read(Path(TEACHER)).content
    content["state_dict"]["model.head.weight"] += 1
    checkpoint.save(content, Path(TEACHER))
    with pytest.raises(ValueError, match=r"belongs to another run: teacher was '\w+', is '\w+'"):
        start(*words[:-2], "ckpt=runs/a", "trainer.max_steps=4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=distill"], "teacher is not given: init=CKPT"),
        (["objective=layerwise", "objective.teacher=nope.ckpt"], "objective.teacher=nope.ckpt does not exist"),
        (["objective=layerwise", f"init={TEACHER}"], "this is the teacher's: type attn=favor"),
        (["objective=layerwise", f"objective.teacher={TEACHER}"], "size mismatch|it has no|which the model has not"),
        (
            ["objective=distill", f"objective.teacher={TEACHER}", "tokenizer=characters"],
            "knows other ids than the student",
        ),
        (
            ["objective=distill", f"objective.teacher={TEACHER}", "model=performer_encoder"],
            "objective=clm predicts each next token",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_a_line(
    words: list[str], message: str, start: Start, teacher: PerformerLM
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        start(*words, "run_dir=runs/a")
    assert "\n" not in str(refusal.value)
    assert not Path("runs").exists()


OTHERS = {  # of one class of backend
    "features": (["attn=favor"], ["attn=favor", "attn/features=learned"], [0, 1]),
    "options": (["attn=favor"], ["attn=favor", "attn.num_features=4"], [0, 1]),
    "kernels": (["attn=favor"], ["attn=relu"], [0, 1]),
    "local heads": (["attn=flash", "model.local_heads=2"], ["attn=favor", "model.local_heads=2"], [0, 1]),
    "patterns": (["attn=hybrid", "attn.pattern=[flash]"], ["attn=hybrid", "attn.pattern=[flash,favor]"], [1]),
    "none": (["attn=flash"], ["attn=hybrid", "attn.pattern=[flash]"], []),
}


@pytest.mark.parametrize(("teacher", "student", "layers"), OTHERS.values(), ids=OTHERS)
def test_layers_of_another_attention_are_told_by_features_options_and_heads(
    teacher: list[str], student: list[str], layers: list[int], model_section: Section
) -> None:
    one, other = (checkpoint.build(model_section(*words)) for words in (teacher, student))
    assert checkpoint.other_attention(one, other.train()) == layers
    assert checkpoint.other_attention(one, one) == []


def test_layerwise_leaves_layers_that_attend_as_the_teacher_does(teacher: PerformerLM, model_section: Section) -> None:
    words = ["attn=hybrid", "attn.pattern=[flash,favor]", "model=transformer", "model.key_heads=2"]
    model: PerformerLM = checkpoint.build(model_section(*words, vocab_size=257))
    checkpoint.load_weights(model, teacher.state_dict(), source="teacher")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = learn(model, Layerwise(teacher=TEACHER, chunk_size=None), steps=3)
    assert losses[-1] < losses[0]
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["performer.layers.1.attention.body.project_in.weight"]
