"""Random features estimate their kernel without bias."""

import math

import pytest
import torch

from performer_lm.ops.features import exponential
from performer_lm.ops.projections import draw_projection

DRAWS = 4000


@pytest.mark.parametrize("damping", [0.0, -0.05])
@pytest.mark.parametrize("coupling", ["iid", "orthogonal", "simplex"])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_exponential_features_are_unbiased(coupling: str, damping: float, direction: float) -> None:
    """Also along +-e_1, where an orthogonal matrix without its sign repair is off by eight percent."""
    d = 8
    x = 0.5 * direction * torch.eye(d, dtype=torch.float64)[:1]
    projection = draw_projection(DRAWS, d, d, seed=0, coupling=coupling).double()
    log = exponential(x, projection, damping=damping).log_scale
    assert log is not None
    normaliser = (1.0 - 4.0 * damping) ** (d / 2)
    estimates = normaliser * (2 * log).exp().mean(dim=-1).squeeze(-1)
    standard_error = estimates.std() / math.sqrt(DRAWS)
    assert (estimates.mean() - math.exp(0.25)).abs() < 4 * standard_error
