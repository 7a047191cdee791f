"""What attention by the delta rule adds to the laws of all backends (`test_laws.py`): its options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.attention.delta import DeltaAttention
from performer_lm.building import build
from performer_lm.nn.mixing import WriteStrength

Build = Callable[..., dict[str, Any]]


def delta(model_section: Build, *overrides: str) -> DeltaAttention:
    """Build a small backend of 4 heads over 2 key heads."""
    section = model_section("attn=delta", "attn.num_features=8", *overrides)["attn"]
    built: DeltaAttention = build(section)(heads=4, key_heads=2, dim_head=6, dim_value=5, layer=0)
    return built


@pytest.mark.parametrize("features", ["positive", "hyperbolic", "learned", "generalized"])
def test_a_temperature_is_a_factor_on_queries_and_keys(model_section: Build, features: str) -> None:
    plain, warm = (
        delta(model_section, f"attn/features={features}", f"attn.temperature={start}") for start in ("null", 3)
    )
    warm.features.load_state_dict(plain.features.state_dict())
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 5)
    torch.testing.assert_close(warm(q, k, v, causal=True), plain(3 * q, 3 * k, v, causal=True))
    warm(q, k, v, causal=True).square().sum().backward()
    assert warm.temperature is not None
    assert warm.temperature.grad is not None
    assert bool((warm.temperature.grad != 0).all())


@pytest.mark.parametrize(
    "where",
    [
        ["attn=delta", "attn.beta_start=-2"],
        ["attn=delta", "attn.beta_start=-2", "model.local_heads=1"],
        ["attn=hybrid", "attn.pattern=[delta]", "attn.backends.delta.beta_start=-2"],
    ],
)
def test_beta_starts_where_the_backend_says(model_section: Build, where: list[str]) -> None:
    model = checkpoint.build(model_section(*where))
    found = [part for part in model.modules() if isinstance(part, WriteStrength)]
    assert found
    for part in found:
        torch.testing.assert_close(part(torch.randn(1, 3, part.weight.shape[1])).logit().unique(), torch.tensor([-2.0]))
