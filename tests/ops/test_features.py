"""Feature maps estimate their kernels without bias, with the variance that theory gives them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from performer_lm.ops.maps import (
    ACTIVATIONS,
    POSITIVE,
    Exponential,
    Features,
    Generalized,
    Taylor,
    Trigonometric,
    optimal_damping,
)
from performer_lm.ops.projections import draw_projection

DRAWS = 4000
WIDTH = 8


def pair(square: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw x and y `(1, d)` with |x + y|^2 = `square`."""
    x, y = torch.randn(2, 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return tuple(z * math.sqrt(square) / (x + y).norm() for z in (x, y))


def draw(coupling: str, num_features: int = WIDTH, *, seed: int = 0) -> Tensor:
    return draw_projection(DRAWS, num_features, WIDTH, seed=seed, coupling=coupling).double()


def product(one: Features, other: Features) -> Tensor:
    """Return the mean over features of phi(x) phi(y), one estimate of the kernel per draw."""
    logs = torch.zeros(())
    for features in (one, other):
        logs = logs if features.log_scale is None else logs + features.log_scale
    values = torch.ones(())
    for features in (one, other):
        values = values if features.values is None else values * features.values
    return (values * logs.exp()).mean(dim=-1).squeeze(-1)


def exponential(x: Tensor, w: Tensor, *, damping: float = 0.0) -> Features:
    """Return FAVOR+'s features of x, or with `damping` those of FAVOR++."""
    bias = (damping * w.square().sum(dim=-1),) if damping else ()
    a_map = Exponential((w, *bias), scale=math.sqrt(1.0 - 4.0 * damping), norm=0.5)
    logs, gain = a_map(x.expand(len(w), -1, -1)).log_scale, a_map.gain(x.expand(len(w), -1, -1))
    assert logs is not None
    assert gain is not None
    return Features(None, logs + gain[..., None])


def near(estimates: Tensor, expected: float) -> bool:
    """Return True if the mean lies within four standard errors."""
    return bool((estimates.mean() - expected).abs() < 4 * estimates.std() / math.sqrt(len(estimates)))


def vectors(where: str) -> tuple[Tensor, Tensor]:
    """Return x and y with |x + y|^2 = 1.5, along the first axis or anywhere."""
    if where.endswith("axis"):
        z = math.sqrt(1.5) * (-1.0 if where.startswith("against") else 1.0) * torch.eye(WIDTH)[:1].double()
        return 0.7 * z, 0.3 * z
    return pair(1.5, seed=int(where))


@pytest.mark.parametrize("where", ["0", "1", "along an axis", "against an axis"])
@pytest.mark.parametrize("coupling", ["iid", "orthogonal", "simplex"])
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "optimal", "trigonometric"])
def test_maps_of_the_softmax_kernel_are_unbiased(name: str, coupling: str, where: str) -> None:
    """An orthogonal matrix without its sign repair is off by eight percent along axes."""
    x, y = vectors(where)
    w = draw(coupling, seed=len(where))
    damping = 0.0
    if name == "trigonometric":
        # cosines and sines share one draw: their mean over 2 m features is half the kernel
        one, other, share = *(Trigonometric((w,))(z) for z in (x, y)), 2.0
    else:
        w = torch.cat([w, -w], dim=1) if name == "hyperbolic" else w
        damping = optimal_damping(torch.tensor(1.5), WIDTH).item() if name == "optimal" else 0.0
        one, other, share = exponential(x, w, damping=damping), exponential(y, w, damping=damping), 1.0
    estimates = share * (1.0 - 4.0 * damping) ** (WIDTH / 2) * product(one, other)
    assert near(estimates, math.exp((x * y).sum()))


def relative_square(x: Tensor, y: Tensor, w: Tensor, damping: float = 0.0) -> Tensor:
    """Return the squared relative error of each draw's estimate."""
    estimates = product(exponential(x, w, damping=damping), exponential(y, w, damping=damping))
    estimates = estimates * (1.0 - 4.0 * damping) ** (WIDTH / 2) / math.exp((x * y).sum())
    return (estimates - 1.0).square()


@pytest.mark.parametrize("square", [0.3, 1.0])
def test_errors_of_iid_features_are_those_of_the_closed_forms(square: float) -> None:
    """Relative variance (e^|z|^2 - 1) / m, half of it times (1 - e^-|z|^2) for pairs (2009.14794, lemma 2)."""
    (x, y), w = pair(square), draw("iid")
    positive = math.expm1(square) / WIDTH
    assert near(relative_square(x, y, w), positive)
    assert near(relative_square(x, y, torch.cat([w, -w], dim=1)), 0.5 * -math.expm1(-square) * positive)


@pytest.mark.parametrize("damping", [-0.02, -0.1])
def test_error_of_damped_features_is_that_of_the_closed_form(damping: float) -> None:
    """(1 - 4A)^d (1 - 8A)^(-d/2) exp(2 (1 - 4A) / (1 - 8A) |z|^2 - |x|^2 - |y|^2) (2205.15317)."""
    (x, y), w = pair(1.0), draw("iid")
    a, square = damping, 1.0
    log_moment = WIDTH * math.log(1 - 4 * a) - WIDTH / 2 * math.log(1 - 8 * a)
    log_moment += 2 * (1 - 4 * a) / (1 - 8 * a) * square - square
    assert near(relative_square(x, y, w, damping), math.expm1(log_moment) / WIDTH)


@given(mean_square=st.floats(0.01, 64.0), dim=st.integers(1, 128))
def test_optimal_damping_is_never_positive_and_minimal(mean_square: float, dim: int) -> None:
    def log_moment(a: Tensor) -> Tensor:
        spread = dim * (1 - 4 * a).log() - dim / 2 * (1 - 8 * a).log()
        return spread + 2 * (1 - 4 * a) / (1 - 8 * a) * mean_square

    best = optimal_damping(torch.tensor(mean_square, dtype=torch.float64), dim)
    assert best <= 0
    assert all(log_moment(best) <= log_moment(best * factor) + 1e-9 for factor in (0.9, 1.1))


def test_optimal_damping_of_nothing_is_favor() -> None:
    assert optimal_damping(torch.zeros(()), 8) == 0


def test_orthogonal_error_keeps_theorem_two() -> None:
    """MSE(ort) <= MSE(iid) - 2 (m - 1) / (m (d + 2)) (SM - e^(-(|x|^2 + |y|^2) / 2))^2, here relative to SM^2."""
    (x, y), m = pair(1.0), WIDTH
    softmax = math.exp((x * y).sum())
    least = math.exp(-0.5 * (x.square().sum() + y.square().sum()))
    gain = 2 * (m - 1) / (m * (WIDTH + 2)) * (1 - least / softmax) ** 2
    errors = relative_square(x, y, draw("orthogonal"))
    assert errors.mean() < math.expm1(1.0) / m - gain + 4 * errors.std() / math.sqrt(DRAWS)


@pytest.mark.parametrize("square", [1.0, 3.0])
def test_optimal_features_err_less_than_favor(square: float) -> None:
    (x, y), w = pair(square), draw("orthogonal")
    damping = optimal_damping(torch.tensor(square), WIDTH).item()
    assert relative_square(x, y, w, damping).mean() < relative_square(x, y, w).mean()


def test_taylor_is_the_first_terms_of_the_exponential() -> None:
    x, y = torch.randn(2, 5, 4, dtype=torch.float64)
    one, other = (Taylor(())(z).values for z in (x, y))
    assert one is not None
    assert other is not None
    assert one.shape[-1] == 1 + 4 + 10
    score = (x * y).sum(dim=-1)
    assert torch.allclose((one * other).sum(dim=-1), 1 + score + score.square() / 2)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_positive_activations_are_those_that_never_go_below_zero(name: str) -> None:
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)[:, None]
    values = Generalized((), activation=name)(x).values
    assert values is not None
    assert bool((values >= 0).all()) == (name in POSITIVE)
