"""Projections are a pure function of (seed, layer, index), Haar-distributed, with the norms they promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.ops.projections import COUPLINGS, default_num_features, draw_projection, haar, simplex


@given(
    heads=st.integers(1, 3),
    num_features=st.integers(1, 20),
    dim=st.integers(2, 8),
    coupling=st.sampled_from(sorted(COUPLINGS)),
    regularized=st.booleans(),
)
def test_draws_repeat_whatever_the_global_generator(
    heads: int, num_features: int, dim: int, coupling: str, regularized: bool
) -> None:
    def draw(**numbers: int) -> torch.Tensor:
        numbers = {"seed": 3, "layer": 1, "index": 2} | numbers
        return draw_projection(heads, num_features, dim, coupling=coupling, regularized=regularized, **numbers)

    before = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert first.shape == (heads, num_features, dim)
    assert torch.equal(draw(), first)
    assert all(not torch.equal(draw(**{name: 7}), first) for name in ("seed", "layer", "index"))


def test_draws_on_the_host_inside_a_device_context() -> None:
    with torch.device("meta"):
        inside = draw_projection(2, 6, 4, seed=0)
    assert torch.equal(inside, draw_projection(2, 6, 4, seed=0))


@pytest.mark.parametrize("num_features", [3, 8, 20])
def test_orthogonal_blocks(num_features: int) -> None:
    rows = draw_projection(2, num_features, 8, seed=0, regularized=True).double()
    assert torch.allclose(rows.norm(dim=-1), torch.full(rows.shape[:-1], math.sqrt(8.0), dtype=torch.float64))
    for block in rows.split(8, dim=1):
        gram = block @ block.mT
        assert torch.allclose(gram, 8.0 * torch.eye(block.shape[1], dtype=torch.float64).expand_as(gram), atol=1e-5)


def test_simplex_vectors_are_unit_and_equally_far_apart() -> None:
    vectors = simplex(5)
    expected = torch.full((5, 5), -1.0 / 4.0, dtype=torch.float64).fill_diagonal_(1.0)
    assert torch.allclose(vectors @ vectors.mT, expected)


def test_haar_has_no_preferred_sign() -> None:
    """LAPACK's Q, uncorrected, has a negative first diagonal entry always."""
    count = 4000
    diagonal = haar(count, 4, generator=torch.Generator().manual_seed(0)).diagonal(dim1=-2, dim2=-1)
    standard_error = diagonal.std(dim=0) / math.sqrt(count)
    assert (diagonal.mean(dim=0).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("coupling", sorted(COUPLINGS))
def test_chi_rows_are_standard_normal(coupling: str) -> None:
    rows = draw_projection(2000, 4, 4, seed=1, coupling=coupling).double()
    for moment, expected in ((rows, 0.0), (rows.square(), 1.0), (rows**4, 3.0)):
        error = moment.mean(dim=(0, 1)) - expected
        # rows of one block are dependent, so the 2000 heads alone count as samples
        assert (error.abs() < 4 * moment.mean(dim=1).std(dim=0) / math.sqrt(2000)).all()


def test_default_num_features_is_d_ln_d() -> None:
    assert default_num_features(64) == 266
    assert default_num_features(1) == 1


def test_unknown_coupling_is_named() -> None:
    with pytest.raises(ValueError, match="one of iid, orthogonal, simplex, got 'givens'"):
        draw_projection(1, 4, 4, seed=0, coupling="givens")
