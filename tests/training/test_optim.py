from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from performer_lm.model import PerformerLM
from performer_lm.training import optim
from performer_lm.training.optim import HostMuon, adamw, check_scaling, muon, orthogonalize, parameter_groups

ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "fused": False}
MUON: dict[str, Any] = {**ADAMW, "matrix_lr": 0.02, "momentum": 0.95}
BUILDERS = {"adamw": partial(adamw, **ADAMW), "muon": partial(muon, **MUON)}


def names(model: PerformerLM, *groups: dict[str, Any]) -> set[str]:
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_parameters_stand_in_one_group_each(lively_model: Callable[..., PerformerLM]) -> None:
    model = lively_model()
    matrices, outputs, rest = parameter_groups(model, head=model.head)
    assert names(model, matrices, outputs, rest) == {name for name, _ in model.named_parameters()}
    assert sum(len(group["params"]) for group in (matrices, outputs, rest)) == len(list(model.parameters()))
    assert names(model, outputs) == {"head.weight"}
    assert "performer.layers.0.attention.body.project_in.weight" in names(model, matrices)
    for word in ("norm.gain", "convolution.weight", "project.bias", "embedding.weight"):
        assert any(name.endswith(word) for name in names(model, rest))
        assert not any(name.endswith(word) for name in names(model, matrices, outputs))
    assert [group["decays"] for group in (matrices, outputs, rest)] == [True, True, False]


def test_a_tied_embedding_does_not_decay(lively_model: Callable[..., PerformerLM]) -> None:
    model = lively_model("model.tie_embeddings=true")
    groups = parameter_groups(model, head=model.head)
    assert "embedding.weight" not in names(model, *[group for group in groups if group["decays"]])
    assert "embedding.weight" in names(model, *[group for group in groups if not group["decays"]])


EVERYTHING = {
    "layer norms": ["model/norm=layer", "model/absolute=learned", "model.qkv_bias=true", "model.out_bias=true"],
    "rezero": ["model/norm=none", "model.rezero=true", "model.head_bias=true", "model.feed_forward.bias=true"],
    "learned features": ["attn/features=learned", "attn.features.centred=true", "model.qk_norm=8"],
}


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
def test_only_the_weights_of_linear_layers_decay(lively_model: Callable[..., PerformerLM], options: list[str]) -> None:
    model = lively_model(*options)
    groups = parameter_groups(model, head=model.head)
    decaying = names(model, *[group for group in groups if group["decays"]])
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert decaying == linear
    assert all(model.get_parameter(name).ndim == 2 for name in decaying)
    for word in ("gain", "offset", "bias", "gate", "projection", "centres", "vectors", "logit"):
        assert not any(name.endswith(word) for name in decaying)


def test_frozen_parameters_are_left_out(lively_model: Callable[..., PerformerLM]) -> None:
    model = lively_model()
    model.head.weight.requires_grad_(False)
    assert "head.weight" not in names(model, *parameter_groups(model, head=model.head))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_decay_acts_where_it_should(build: Callable[..., Any], lively_model: Callable[..., PerformerLM]) -> None:
    model = lively_model().float()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build(parameter_groups(model, head=model.head))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in parameter_groups(model, head=model.head):
        for name in names(model, group):
            shrunk = not torch.equal(model.get_parameter(name), before[name])
            assert shrunk == group["decays"], name


class Bowl(nn.Module):
    """A loss with its minimum at known weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh())


def train(build: Callable[..., Any], steps: int, saved: dict[str, Any] | None = None) -> tuple[list[float], Any]:
    torch.manual_seed(0)
    model, x = Bowl(), torch.randn(64, 6)
    y = x[:, :2]
    optimizer = build(parameter_groups(model, head=model.head))
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    return losses, parts


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_learns_and_resumes_exactly(build: Callable[..., Any], tmp_path: Any) -> None:
    whole, _ = train(build, 30)
    assert whole[-1] < 0.9 * whole[0]
    first, parts = train(build, 11)
    torch.save(parts, tmp_path / "parts.pt")
    second, _ = train(build, 19, torch.load(tmp_path / "parts.pt", weights_only=True))
    assert first + second == whole


def test_a_schedule_moves_the_rates_of_both_parts() -> None:
    _, parts = train(BUILDERS["muon"], 3)
    rates = [group["lr"] for part in parts["optimizer"]["parts"] for group in part["param_groups"]]
    assert rates == pytest.approx([0.02 / 4, 1e-2 / 4, 1e-2 / 4])


def test_bad_betas_are_refused() -> None:
    with pytest.raises(ValueError, match="betas must be 2 numbers, got 1"):
        adamw([], **{**ADAMW, "betas": [0.9]})


def test_fused_adamw_does_not_go_with_scaled_losses() -> None:
    model = Bowl()
    groups = parameter_groups(model, head=model.head)
    fused, plain, together = adamw(groups, **{**ADAMW, "fused": True}), adamw(groups, **ADAMW), muon(groups, **MUON)
    with pytest.raises(ValueError, match=r"optimizer\.fused=true does not go with trainer\.precision=16-mixed"):
        check_scaling(fused, precision="16-mixed")
    for optimizer, precision in ((fused, "bf16-mixed"), (plain, "16-mixed"), (together, "16-mixed")):
        check_scaling(optimizer, precision=precision)


def step_muon(monkeypatch: pytest.MonkeyPatch, *, emulated: bool) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Take two steps of Muon on a CPU that emulates products of bfloat16, or does not."""
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda kind: not emulated)
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 6), (5, 5))]
    optimizer = HostMuon(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    return [parameter.detach() for parameter in parameters], optimizer.state_dict()


def test_muon_on_a_cpu_without_bfloat16_is_torchs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, torchs = step_muon(monkeypatch, emulated=False)
    wide, ours = step_muon(monkeypatch, emulated=True)
    for one, other in zip(wide, narrow, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0, atol=0.2 * 2**-5)  # two updates of 0.1, of 8 bits
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0)  # the state knows gradients only


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 4)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    group = HostMuon([nn.Parameter(torch.zeros(shape))]).param_groups[0]
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), group))
    assert values.amin() > 0.5
    assert values.amax() < 1.3
