"""Approximation is measured against the definition, and improves where theory says it must."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from performer_lm.attention.favor import FavorAttention
from performer_lm.evaluation.approximation.layer import materialise_weights, measure_approximation
from performer_lm.ops.softmax import exact_attention

Build = Callable[..., FavorAttention]
Inputs = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.mark.parametrize(
    ("features", "causal"), [(x, c) for x in ("positive", "centred", "relu") for c in (True, False)] + [("trig", False)]
)
def test_implied_weights_reproduce_the_output(build: Build, inputs: Inputs, features: str, causal: bool) -> None:
    attention, (q, k, v) = build(features).double(), (x.double() for x in inputs(0.5))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    decay = {"log_decay": -torch.rand(2, 2, 12).double()} if causal else {}
    weights = materialise_weights(attention, q, k, causal=causal, **decay).implied
    expected = attention(q, k, v, causal=causal, **decay)
    assert (weights @ v.repeat_interleave(2, dim=1) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("queries", [12, 5])
@pytest.mark.parametrize("decays", [False, True])
def test_exact_weights_reproduce_exact_attention(build: Build, inputs: Inputs, queries: int, decays: bool) -> None:
    q, k, v = inputs()
    q, decay = q[:, :, -queries:], {"log_decay": -torch.rand(2, 2, 12)} if decays else {}
    out = materialise_weights(build(), q, k, **decay).exact @ v.repeat_interleave(2, dim=1)
    assert torch.allclose(out, exact_attention(q, k, v, causal=True, **decay), atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_measures_are_those_of_outputs_and_weights(build: Build, inputs: Inputs, causal: bool) -> None:
    attention, (q, k, v) = build(), inputs(0.7)
    found = measure_approximation(attention, q, k, v, causal=causal)
    out, expected = attention(q, k, v, causal=causal), exact_attention(q, k, v, causal=causal)
    size = torch.linalg.vector_norm(out - expected, dim=(0, 2, 3)) / torch.linalg.vector_norm(expected, dim=(0, 2, 3))
    implied, exact = materialise_weights(attention, q, k, causal=causal)
    near(found.relative_error, size)
    near(found.total_variation, 0.5 * (implied - exact).abs().sum(dim=-1).mean(dim=(0, 2)))
    near(found.query_norm, (q * 8**-0.25).norm(dim=-1).mean(dim=(0, 2)))


def test_the_figures_are_those_of_the_definition(build: Build, inputs: Inputs) -> None:
    """In float64, pair by pair, from the features' formula (2009.14794, lemma 1) and softmax's."""
    attention, (q, k, v) = build(num_features=16), (x.double() for x in inputs(0.8, n=7))
    decay = -torch.rand(2, 2, 7).double()
    found = measure_approximation(attention, q, k, v, log_decay=decay)
    projection: Tensor = attention.features.projection.double()  # type: ignore[union-attr,operator,assignment]
    totals = torch.zeros(4, 4, dtype=torch.float64)
    effective, pairs = torch.zeros(4, dtype=torch.float64), 0
    for b in range(2):
        for i in range(7):
            pairs += i + 1
            for h in range(4):
                x, keys = q[b, h, i] * 8**-0.25, k[b, h // 2, : i + 1] * 8**-0.25
                faded = torch.stack([decay[b, h // 2, j + 1 : i + 1].sum() for j in range(i + 1)]).exp()
                products = (keys @ projection[h // 2].T - 0.5 * keys.square().sum(-1, keepdim=True)).exp()
                products = products * (projection[h // 2] @ x - 0.5 * x.square().sum()).exp()
                effective[h] += (products.sum(-1).square() / products.square().sum(-1)).sum()
                implied, exact = products.sum(-1) * faded, (keys @ x).exp() * faded
                implied, exact = implied / implied.sum(), exact / exact.sum()
                out = ((implied - exact) @ v[b, h // 2, : i + 1], exact @ v[b, h // 2, : i + 1])
                squares = [each.square().sum() for each in (*out, implied - exact, exact)]
                totals[:, h] += torch.stack(squares)
    near(found.relative_error, (totals[0] / totals[1]).sqrt())
    near(found.matrix_error, (totals[2] / totals[3]).sqrt())
    near(found.effective_features, effective / (pairs))


def test_rows_of_weights_sum_to_one_and_see_no_later_key(build: Build, inputs: Inputs) -> None:
    q, k, _ = inputs()
    mask = torch.rand(2, 12) > 0.3
    mask[:, 0] = True
    for matrix in materialise_weights(build(), q, k, mask=mask, log_decay=-torch.rand(2, 2, 12)):
        near(matrix.sum(dim=-1), torch.ones(2, 4, 12))
        assert not matrix.triu(1).any()
        assert not matrix[:, :, :, ~mask[0]][0].any()
    both = materialise_weights(build(), q, k, causal=False, segments=torch.arange(12).div(5).int().expand(2, -1))
    for matrix in both:
        near(matrix.sum(dim=-1), torch.ones(2, 4, 12))
        assert not matrix[:, :, :5, 5:].any()
        assert not matrix[:, :, 5:10, :5].any()


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.double(), other.double(), atol=1e-5, rtol=1e-5)


def test_masked_keys_and_other_documents_do_not_count(build: Build, inputs: Inputs) -> None:
    q, k, v = inputs()
    alone = measure_approximation(build(), q[:, :, 7:], k[:, :, 7:], v[:, :, 7:])
    for more in ({"mask": (torch.arange(12) >= 7).expand(2, -1)}, {"segments": (torch.arange(12) >= 7).expand(2, -1)}):
        found = measure_approximation(build(), q, k, v, queries=None, **more)
        chosen = measure_approximation(build(), q[:, :, 7:], k, v, **more)
        near(chosen.total_variation, alone.total_variation)
        near(chosen.effective_features, alone.effective_features)
        assert found.total_variation.isfinite().all()


def test_some_queries_stand_for_all(build: Build, inputs: Inputs) -> None:
    q, k, v = inputs(n=40)
    every, some = (measure_approximation(build(), q, k, v, queries=count) for count in (40, 20))
    assert torch.allclose(some.total_variation, every.total_variation, atol=0.1)
    last = measure_approximation(build(), q, k, v, queries=1)
    near(last.total_variation, measure_approximation(build(), q[:, :, -1:], k, v).total_variation)
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        measure_approximation(build(), q, k, v, queries=0)


def test_more_features_err_less(build: Build, inputs: Inputs) -> None:
    q, k, v = inputs(0.7, n=32)
    few, many = (measure_approximation(build(num_features=m), q, k, v) for m in (8, 2048))
    assert (many.relative_error < 0.5 * few.relative_error).all()
    assert (many.total_variation < 0.5 * few.total_variation).all()


def test_loud_vectors_leave_few_features_to_carry_a_weight(build: Build, inputs: Inputs) -> None:
    q, k, v = inputs(0.1, n=16)
    quiet, loud = measure_approximation(build(), q, k, v), measure_approximation(build(), 50 * q, 50 * k, v)
    assert (quiet.effective_features > 25).all()  # of 32
    assert (loud.effective_features < 5).all()
    assert torch.allclose(loud.query_norm, 50 * quiet.query_norm)
    assert torch.allclose(loud.key_norm, 50 * quiet.key_norm)


def test_equal_weights_are_softmax_of_nothing(build: Build, inputs: Inputs) -> None:
    q, k, v = inputs()
    assert (measure_approximation(build(), 0 * q, k, v).uniform_total_variation < 1e-6).all()


def test_loud_vectors_stay_finite(build: Build, inputs: Inputs) -> None:
    found = measure_approximation(build(), *inputs(10.0))
    assert all(x.isfinite().all() for x in found)
    assert all((x < 1.0 + 1e-6).all() for x in (found.total_variation, found.uniform_total_variation))
