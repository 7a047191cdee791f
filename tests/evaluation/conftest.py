"""FAVOR attention of every kind of features, and vectors for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.feature_maps import SoftmaxFeatures
from performer_lm.attention.kernel_maps import GeneralizedFeatures, TrigonometricFeatures

DRAWN = {"coupling": "orthogonal", "regularized": False}
FEATURES: dict[str, Any] = {
    "positive": partial(SoftmaxFeatures, antithetic=False, learned=False, centred=False, momentum=None, **DRAWN),
    "centred": partial(SoftmaxFeatures, antithetic=True, learned=False, centred=True, momentum=None, **DRAWN),
    "relu": partial(GeneralizedFeatures, activation="relu", epsilon=1e-3, **DRAWN),
    "trig": partial(TrigonometricFeatures, **DRAWN),
}


@pytest.fixture(scope="session")
def build() -> Callable[..., FavorAttention]:
    """Return a function from the name of features and their number to attention of 4 heads over 2 key heads."""

    def build_favor(features: str = "positive", num_features: int = 32) -> FavorAttention:
        shape = {"heads": 4, "key_heads": 2, "dim_head": 8, "dim_value": 6, "layer": 0, "num_features": num_features}
        rest = {"seed": 0, "redraw_interval": None, "redraw_until": None, "chunk_size": 8}
        return FavorAttention(features=FEATURES[features], **shape, **rest)

    return build_favor


@pytest.fixture(scope="session")
def inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return a function from the size of vectors and their number to q, k and v of that attention."""

    def draw(std: float = 1.0, n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
        return std * torch.randn(2, 4, n, 8), std * torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 6)

    return draw
