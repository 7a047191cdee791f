"""Diagnosis sees what attention sees, in every layer that runs FAVOR, and leaves the model as it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from performer_lm.attention.favor import FavorAttention
from performer_lm.evaluation.approximation.layer import measure_approximation
from performer_lm.evaluation.approximation.model import Vectors, diagnose, watch
from performer_lm.model import PerformerLM

Build = Callable[..., PerformerLM]


def tokens(n: int = 20) -> Tensor:
    return torch.randint(0, 40, (2, n))


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["attn=favor"], {"layer0": 4, "layer1": 4}),
        (["attn=favor", "model.local_heads=1"], {"layer0": 3, "layer1": 3}),
        (["attn=hybrid", "attn.pattern=[flash,favor]"], {"layer1": 4}),
        (["attn=relu"], {"layer0": 4, "layer1": 4}),
        (["attn=exact"], {}),
    ],
)
def test_every_layer_with_favor_is_measured(lively_model: Build, overrides: list[str], layers: dict[str, int]) -> None:
    found = diagnose(lively_model(*overrides), tokens())
    assert {layer: len(x.relative_error) for layer, x in found.items()} == layers
    assert all(measure.isfinite().all() for x in found.values() for measure in x)


def test_what_is_measured_is_what_attention_receives(lively_model: Build) -> None:
    """With as many features as it takes, what a layer gives is what exact attention gives: the error vanishes."""
    model, ids = lively_model("attn=favor", "attn.num_features=4096"), tokens()
    seen: list[str] = []

    def look(layer: str, attention: FavorAttention, vectors: Vectors, more: dict[str, object]) -> None:
        seen.append(layer)
        assert more["causal"] is True
        assert more["log_decay"] is not None
        q, k, v = (0.1 * x for x in vectors)
        found = measure_approximation(attention, q, k, v, log_decay=more["log_decay"])
        assert (found.relative_error < 0.05).all()

    watch(model, look, lambda: model(ids))
    assert seen == ["layer0", "layer1"]


def test_nothing_changes(lively_model: Build) -> None:
    model, ids = lively_model("attn=favor", "attn/features=optimal", "model.dropout=0.5"), tokens()
    model.train()
    model.performer.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, generator = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    first, again = diagnose(model, ids), diagnose(model, ids)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert all(
        torch.equal(one, other) for layer in first for one, other in zip(first[layer], again[layer], strict=True)
    )
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failing_forward_leaves_no_trace(lively_model: Build) -> None:
    model = lively_model("attn=favor").train()
    with pytest.raises(IndexError):
        diagnose(model, tokens() + 1000)
    assert model.training
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_options_reach_the_model(lively_model: Build) -> None:
    model, ids = lively_model("attn=favor"), tokens()
    mask = (torch.arange(20) >= 8).expand(2, -1)
    padded, alone = diagnose(model, ids, queries=None, mask=mask), diagnose(model, ids[:, 8:], queries=None)
    for layer, found in alone.items():
        assert torch.allclose(padded[layer].effective_features, found.effective_features)
