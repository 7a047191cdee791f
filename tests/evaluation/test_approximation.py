"""Approximation is measured against the definition, and improves where theory says it must."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.feature_maps import SoftmaxFeatures
from performer_lm.attention.kernel_maps import GeneralizedFeatures, TrigonometricFeatures
from performer_lm.evaluation.approximation import exact_weights, implied_weights, measure_approximation
from performer_lm.ops.softmax import exact_attention

DRAWN = {"coupling": "orthogonal", "regularized": False}
POSITIVE = partial(SoftmaxFeatures, antithetic=False, learned=False, centred=False, momentum=None, **DRAWN)
CENTRED = partial(SoftmaxFeatures, antithetic=True, learned=False, centred=True, momentum=None, **DRAWN)
RELU = partial(GeneralizedFeatures, activation="relu", epsilon=1e-3, **DRAWN)
TRIG = partial(TrigonometricFeatures, **DRAWN)


def build(features: Any = POSITIVE, num_features: int = 32) -> FavorAttention:
    shape = {"heads": 4, "key_heads": 2, "dim_head": 8, "dim_value": 6, "layer": 0, "num_features": num_features}
    rest = {"seed": 0, "redraw_interval": None, "redraw_until": None, "chunk_size": 8}
    return FavorAttention(features=features, **shape, **rest)


def inputs(std: float = 1.0, n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    return std * torch.randn(2, 4, n, 8), std * torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 6)


@pytest.mark.parametrize(
    ("features", "causal"), [(x, c) for x in (POSITIVE, CENTRED, RELU) for c in (True, False)] + [(TRIG, False)]
)
def test_implied_weights_reproduce_the_output(features: Any, causal: bool) -> None:
    attention, (q, k, v) = build(features).double(), (x.double() for x in inputs(0.5))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    weights = implied_weights(attention, q, k, causal=causal)
    expected = attention(q, k, v, causal=causal)
    assert (weights @ v.repeat_interleave(2, dim=1) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("queries", [12, 5])
def test_exact_weights_reproduce_exact_attention(queries: int) -> None:
    q, k, v = inputs()
    q = q[:, :, -queries:]
    out = exact_weights(q, k) @ v.repeat_interleave(2, dim=1)
    assert torch.allclose(out, exact_attention(q, k, v, causal=True), atol=1e-6)


def test_more_features_err_less() -> None:
    q, k, v = inputs(0.7, n=32)
    few, many = (measure_approximation(build(num_features=m), q, k, v) for m in (8, 2048))
    assert (many.relative_error < 0.5 * few.relative_error).all()
    assert (many.total_variation < 0.5 * few.total_variation).all()


def test_loud_vectors_leave_few_features_to_carry_a_weight() -> None:
    q, k, v = inputs(0.1, n=16)
    quiet, loud = measure_approximation(build(), q, k, v), measure_approximation(build(), 50 * q, 50 * k, v)
    assert (quiet.effective_features > 25).all()  # of 32
    assert (loud.effective_features < 5).all()
    assert torch.allclose(loud.query_norm, 50 * quiet.query_norm)
    assert torch.allclose(loud.key_norm, 50 * quiet.key_norm)


def test_equal_weights_are_softmax_of_nothing() -> None:
    q, k, v = inputs()
    assert (measure_approximation(build(), 0 * q, k, v).uniform_total_variation < 1e-6).all()


def test_loud_vectors_stay_finite() -> None:
    found = measure_approximation(build(), *inputs(10.0))
    assert all(x.isfinite().all() for x in found)
    assert all((x < 1.0 + 1e-6).all() for x in (found.total_variation, found.uniform_total_variation))
