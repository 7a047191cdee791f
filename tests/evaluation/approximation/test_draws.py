"""A sweep measures the model's own vectors with other features, and changes nothing of the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from performer_lm.evaluation.approximation.draws import Finding, count_measurements, measure_draws, redrawn
from performer_lm.evaluation.approximation.model import diagnose, favor_layers
from performer_lm.model import PerformerLM

Build = Callable[..., PerformerLM]


def run_sweep(model: Any, counts: list[int], redraws: int = 2, n: int = 24, **options: Any) -> list[Finding]:
    ids = torch.randint(0, 40, (2, n))
    return measure_draws(model, lambda: model(ids), num_features=counts, redraws=redraws, queries=None, **options)


@pytest.mark.parametrize("features", ["positive", "hyperbolic", "optimal"])
def test_the_model_s_own_numbers_give_its_own_features(lively_model: Build, features: str) -> None:
    model = lively_model(
        "attn=favor", f"attn/features={features}", "attn.features.centred=true", "attn.num_features=64"
    )
    for attention in favor_layers(model).values():
        own: Any = attention.features
        same, other = (redrawn(attention, num_features=64, index=own.index + more) for more in (0, 1))
        for name, value in same.state_dict().items():
            assert torch.equal(value, attention.state_dict()[name]), name
        assert not torch.equal(other.features.projection, own.projection)  # type: ignore[arg-type]
        assert torch.equal(other.features.centres, own.centres)  # type: ignore[arg-type]
        halved = redrawn(attention, num_features=32, index=1)
        assert halved.features.num_features == 32
        q, k, v = torch.randn(3, 1, 4, 6, 8, dtype=torch.float64).unbind()
        assert halved(q, k, v, causal=True).isfinite().all()


def test_what_is_found_is_what_a_diagnosis_finds(lively_model: Build) -> None:
    model = lively_model("attn=hybrid", "attn.pattern=[favor,flash]", "attn.backends.favor.num_features=64")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[None] = []
    torch.manual_seed(3)
    found = run_sweep(model, [16, 64], advance=lambda: steps.append(None))
    assert len(steps) == len(found) == count_measurements(model, num_features=[16, 64], redraws=2) == 5
    assert [(each.layer, each.num_features, each.draw) for each in found] == [
        ("layer0", 64, None),
        *(("layer0", count, draw) for count in (16, 64) for draw in (1, 2)),
    ]
    torch.manual_seed(3)
    own = diagnose(model, torch.randint(0, 40, (2, 24)), queries=None)["layer0"]
    assert all(torch.equal(one, other) for one, other in zip(found[0].measures, own, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if "extra" not in name)


def test_more_features_come_closer(lively_model: Build) -> None:
    model = lively_model("attn=favor", "model.qk_norm=1")
    found = [each for each in run_sweep(model, [8, 512]) if each.draw is not None]
    few, many = (
        torch.stack([each.measures.total_variation for each in found if each.num_features == count]).mean()
        for count in (8, 512)
    )
    assert many < 0.5 * few


@pytest.mark.parametrize("overrides", [["attn=linear"], ["attn=favor", "attn/features=learned"]])
def test_features_that_are_not_drawn_are_measured_as_they_are(lively_model: Build, overrides: list[str]) -> None:
    model = lively_model(*overrides)
    assert [each.draw for each in run_sweep(model, [16])] == [None, None]
    with pytest.raises(ValueError, match=r"attn/features=\w+ of layer 0 are not drawn, so not drawn anew"):
        redrawn(favor_layers(model)["layer0"], num_features=16, index=0)


@pytest.mark.parametrize(("features", "count", "wanted"), [("hyperbolic", 15, "even"), ("positive", 0, "at least 1")])
def test_impossible_numbers_are_refused(lively_model: Build, features: str, count: int, wanted: str) -> None:
    attention = favor_layers(lively_model("attn=favor", f"attn/features={features}"))["layer0"]
    with pytest.raises(ValueError, match=f"num_features of attn/features={features} must be {wanted}.*, got {count}"):
        redrawn(attention, num_features=count, index=0)
