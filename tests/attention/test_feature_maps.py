"""Feature maps as modules: what they draw, learn and measure, and that attention keeps its laws on them."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.feature_maps import SoftmaxFeatures
from performer_lm.attention.kernel_maps import (
    GeneralizedFeatures,
    IdentityFeatures,
    TaylorFeatures,
    TrigonometricFeatures,
)
from performer_lm.ops.maps import optimal_damping

DRAWN = {"coupling": "orthogonal", "regularized": False}
SOFTMAX = partial(SoftmaxFeatures, **DRAWN)
PLAIN: dict[str, Any] = {"antithetic": False, "learned": False, "centred": False, "momentum": None}
CAUSAL = {
    "positive": partial(SOFTMAX, **PLAIN),
    "hyperbolic": partial(SOFTMAX, **(PLAIN | {"antithetic": True})),
    "optimal": partial(SOFTMAX, **(PLAIN | {"momentum": 0.5})),
    "learned": partial(SOFTMAX, **(PLAIN | {"learned": True, "antithetic": True})),
    "centred": partial(SOFTMAX, **(PLAIN | {"centred": True})),
    "simplex": partial(SoftmaxFeatures, coupling="simplex", regularized=True, **PLAIN),
    "relu": partial(GeneralizedFeatures, activation="relu", epsilon=1e-3, **DRAWN),
    "exp": partial(GeneralizedFeatures, activation="exp", epsilon=0.0, **DRAWN),
    "taylor2": TaylorFeatures,
}
SIGNED = {
    "trig": partial(TrigonometricFeatures, **DRAWN),
    "cos": partial(GeneralizedFeatures, activation="cos", epsilon=0.0, **DRAWN),
    "tanh": partial(GeneralizedFeatures, activation="tanh", epsilon=0.0, **DRAWN),
}


def build(features: Any, **options: Any) -> FavorAttention:
    shape = {"heads": 4, "key_heads": 2, "dim_head": 8, "dim_value": 6, "layer": 1}
    rest = {"num_features": 16, "seed": 0, "redraw_interval": None, "redraw_until": None, "chunk_size": 4}
    return FavorAttention(features=features, **(shape | rest | options)).double()


def inputs(n: int, std: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(2, 4, n, 8), torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 6)
    return std * q.double(), std * k.double(), v.double()


def quadratic(attention: FavorAttention, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Write attention out from the features that the maps themselves give."""
    q, k, gain = attention.features.prepare(q, k)
    found = []
    for x, a_map in zip((q, k), attention.features.maps(), strict=True):
        rows = x.reshape(2, 2, -1, 8).transpose(0, 1).flatten(1, 2)  # (g, b n, d)
        values, logs = a_map(rows)
        own_gain = a_map.gain(rows)
        logs = torch.zeros(()) if logs is None else logs
        logs = logs if own_gain is None else logs + own_gain[..., None]
        features = (torch.ones(()) if values is None else values) * logs.exp()
        found.append(features.unflatten(1, (2, -1)).transpose(0, 1))
    query, key = found
    query = query.unflatten(2, (2, -1)).flatten(1, 2)
    key, v = key.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    weights = query @ key.mT
    if gain is not None:
        weights = weights * gain.repeat_interleave(2, dim=1)[:, :, None].exp()
    weights = weights.tril() if causal else weights
    return (weights @ v) / weights.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [*CAUSAL, *SIGNED])
def test_attention_equals_its_features_written_out(name: str, causal: bool) -> None:
    attention, tensors = build((CAUSAL | SIGNED)[name]), [x.requires_grad_() for x in inputs(11)]
    if name in SIGNED and causal:
        with pytest.raises(ValueError, match=r"signed features.*attn/features=positive"):
            attention(*tensors, causal=True)
        return
    if name == "centred":
        torch.nn.init.normal_(attention.features.centres)
    leaves = [*tensors, *attention.parameters()]
    out, expected = attention(*tensors, causal=causal), quadratic(attention, *tensors, causal=causal)
    assert (out - expected).abs().max() < 1e-9
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-8 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_equals_training(name: str) -> None:
    attention, (q, k, v) = build(CAUSAL[name]).eval(), inputs(9)
    state, outputs = attention.init_state(2, max_len=9, device=q.device, dtype=q.dtype), []
    for i in range(9):
        out, state = attention.extend(*(x[:, :, i : i + 1] for x in (q, k, v)), state)
        outputs.append(out)
    assert (torch.cat(outputs, dim=2) - attention(q, k, v, causal=True)).abs().max() < 1e-9


def test_identity_features_never_overflow() -> None:
    attention, (q, k, v) = build(IdentityFeatures, num_features=None), inputs(9, std=200.0)
    assert attention(q.float(), k.float(), v.float(), causal=True).isfinite().all()


def test_centres_change_no_softmax_weight() -> None:
    """In the limit of many features: the exact softmax of what is prepared is that of the inputs."""
    features, (q, k, _) = build(CAUSAL["centred"]).features, inputs(9)
    torch.nn.init.normal_(features.centres)
    moved, keys, gain = features.prepare(q, k)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.repeat_interleave(2, dim=1).mT * 8**-0.5

    assert gain is not None
    prepared = scores(moved, keys) + gain.repeat_interleave(2, dim=1)[:, :, None]
    assert torch.allclose(prepared.softmax(dim=-1), scores(q, k).softmax(dim=-1))


def test_averages_move_between_steps_in_training_only() -> None:
    attention, tensors = build(CAUSAL["optimal"]), inputs(400)
    before = attention(*tensors, causal=True)
    assert torch.equal(attention(*tensors, causal=True), before)
    attention.features.settle()
    measured = attention.features.mean_square.clone()
    # x and y are independent with variance .49 / sqrt 8 in each of 8 numbers; half of the way from 0
    assert torch.allclose(measured, torch.full_like(measured, 0.5 * 2 * 8 * 0.49 / 8**0.5), rtol=0.1)
    assert not torch.equal(attention(*tensors, causal=True), before)
    attention.eval()
    attention(*tensors, causal=True)
    attention.features.settle()
    frozen = attention.features.mean_square.clone()
    attention(*tensors, causal=True)
    attention.features.settle()
    assert torch.equal(attention.features.mean_square, frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_are_float32_whatever_the_precision(dtype: torch.dtype) -> None:
    features, wide = (build(CAUSAL["optimal"]).float().features for _ in range(2))
    features.to(dtype)
    features.momentum = wide.momentum = 0.001  # steps that halves would round away
    for _ in range(40):
        q, k = (x.to(dtype) for x in inputs(9)[:2])
        for each in (features, wide):
            each.observe(q, k, None)
            each.settle()
    assert features.mean_square.dtype == torch.float32
    assert torch.allclose(features.mean_square, wide.mean_square)


def test_averages_skip_masked_keys() -> None:
    attention, (q, k, v) = build(CAUSAL["optimal"]), inputs(10)
    mask = torch.arange(10).expand(2, -1) < 6
    attention(q, k, v, causal=True, mask=mask)
    attention.features.settle()
    one = attention.features.mean_square.clone()
    other = build(CAUSAL["optimal"])
    other(q, k.masked_fill(~mask[:, None, :, None], 99.0), v, causal=True, mask=mask)
    other.features.settle()
    assert torch.allclose(one, other.features.mean_square)


def test_the_optimal_map_uses_the_measured_damping() -> None:
    features = build(CAUSAL["optimal"]).features
    features.mean_square.fill_(2.0)
    damping = optimal_damping(torch.tensor(2.0), 8).item()
    query_map, _ = features.maps()
    plain, _ = build(CAUSAL["positive"]).features.maps()
    assert torch.allclose(query_map.tensors[0], plain.tensors[0] * (1 - 4 * damping) ** 0.5)


def test_learned_projections_train_and_are_never_redrawn() -> None:
    attention, tensors = build(CAUSAL["learned"]), inputs(6)
    before = attention.features.projection.clone()
    attention.features.redraw(5)
    assert torch.equal(attention.features.projection, before)
    attention(*tensors, causal=True).sum().backward()
    grad = attention.features.projection.grad
    assert grad is not None
    assert grad.abs().max() > 0


def test_taylor_takes_as_many_dimensions_as_fit() -> None:
    assert build(TaylorFeatures, num_features=16).features.num_features == 15  # 1 + 4 + 10
    full = build(TaylorFeatures, num_features=None).features
    assert full.num_features == 1 + 8 + 36
    assert not list(full.parameters())


@pytest.mark.parametrize("name", ["positive", "hyperbolic", "optimal", "learned", "taylor2"])
def test_features_go_by_their_name_on_the_command_line(name: str) -> None:
    assert build(CAUSAL[name]).features.choice == name
    assert build(CAUSAL["relu"]).features.choice == "generalized"


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (CAUSAL["hyperbolic"], {"num_features": 15}, "even num_features, got 15"),
        (CAUSAL["positive"], {"num_features": 0}, "num_features must be at least 1, got 0"),
        (partial(SOFTMAX, **(PLAIN | {"momentum": 2.0})), {}, "momentum must be above 0 and at most 1, got 2.0"),
        (partial(GeneralizedFeatures, activation="rleu", epsilon=0.0, **DRAWN), {}, "activation must be one of"),
        (partial(GeneralizedFeatures, activation="relu", epsilon=-1.0, **DRAWN), {}, "epsilon must be at least 0"),
        (IdentityFeatures, {"num_features": None, "redraw_interval": 9}, r"redraw_interval \(9\) needs projections"),
        (TaylorFeatures, {"redraw_interval": 9}, r"attn/features=taylor2 has none: set it to null"),
        (CAUSAL["learned"], {"redraw_interval": 9}, r"drawn and not trained"),
        (IdentityFeatures, {"num_features": 9}, "leave num_features null, not 9"),
        (TaylorFeatures, {"num_features": 2}, "taylor2 needs num_features of at least 3, got 2"),
    ],
)
def test_wrong_options_are_named(features: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(features, **options)
