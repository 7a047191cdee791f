"""Feature maps of other kernels than softmax, or of softmax without random positive features.

Letters: `b` batch, `g` key heads, `n` tokens, `d` head width, `m` features.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from performer_lm.attention.feature_maps import AttentionFeatures, DrawOptions, FeatureSizes, RandomFeatures
from performer_lm.ops.hashing import mix_seed
from performer_lm.ops.maps import ACTIVATIONS, POSITIVE, Exponential, FeatureMap, Generalized, Taylor, Trigonometric
from performer_lm.ops.precision import widen
from performer_lm.ops.projections import haar
from performer_lm.ranges import NotNegative, ranged


@ranged
class GeneralizedFeatures(RandomFeatures):
    """The kernel E f(w.x) f(w.y): features f(W x) + epsilon of x = q d^-1/4 (2009.14794, eq. 5).

    Args:
        activation: f, by name.
        epsilon: added to every feature, so that no token is without weight.
        drawn: those of `RandomFeatures` and `AttentionFeatures`.

    Raises:
        ValueError: for an unknown activation, or a negative epsilon.
    """

    backend = "relu"

    def __init__(self, *, activation: str, epsilon: NotNegative, **drawn: Unpack[DrawOptions]) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        super().__init__(**drawn)
        self.signed = activation not in POSITIVE
        self.activation, self.epsilon = activation, epsilon

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return f(W x) + epsilon for both sides."""
        weight = widen(self.projection) * self.dim_head**-0.25
        both = Generalized((weight,), activation=self.activation, epsilon=self.epsilon)
        return both, both


class TrigonometricFeatures(RandomFeatures):
    """Softmax by exp(|x|^2 / 2) [cos w.x, sin w.x] (2009.14794, eq. 4): unbiased but signed, for study.

    The number of features is even: a cosine and a sine of each row drawn.
    """

    choice = "trig"
    signed = True

    def __init__(self, **drawn: Unpack[DrawOptions]) -> None:
        super().__init__(pairs=True, **drawn)

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return the same map for both sides."""
        both = Trigonometric((widen(self.projection),), scale=self.dim_head**-0.25)
        return both, both


class TaylorFeatures(AttentionFeatures):
    """The kernel 1 + s + s^2 / 2 of s = x.y, the first terms of e^s (Based, 2402.18668): no exponential, no sampling.

    `d'` numbers give 1 + d' + d' (d' + 1) / 2 features; x is projected to as many numbers as give no more than
    `num_features`, by a learned matrix that starts as a random rotation and keeps x.y on average. `num_features` of
    None takes d' = d, without a projection.
    """

    choice = "taylor2"

    def __init__(self, **sizes: Unpack[FeatureSizes]) -> None:
        super().__init__(**sizes)
        d = width = self.dim_head
        if sizes["num_features"] is not None:
            fitting = [w for w in range(1, d + 1) if _count_taylor(w) <= self.num_features]
            if not fitting:
                raise ValueError(f"taylor2 needs num_features of at least {_count_taylor(1)}, got {self.num_features}")
            width = fitting[-1]
        self.num_features = _count_taylor(width)
        self.projection = None
        if width < d:
            self.projection = nn.Parameter(torch.empty(self.key_heads, width, d))
            if not self.projection.is_meta:
                generator = torch.Generator(device="cpu").manual_seed(mix_seed(self.seed, self.layer))
                rotation = haar(self.key_heads, d, generator=generator)[:, :width] * (d / width) ** 0.5
                self.projection.data.copy_(rotation)

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return the map of x = q d^-1/4 for both sides."""
        scale = self.dim_head**-0.25
        both = Taylor((), scale=scale) if self.projection is None else Taylor((widen(self.projection) * scale,))
        return both, both


def _count_taylor(width: int) -> int:
    return 1 + width + width * (width + 1) // 2


class IdentityFeatures(AttentionFeatures):
    """softmax(q) over features and exp(k): efficient attention, without random features (1812.01243).

    Keys are exponentiated in log space, so no key overflows; normalised attention of itself takes the softmax over a
    query's features. There are `d` features: `num_features` must be None or `d`.
    """

    backend = "linear"
    identity: Tensor

    def __init__(self, **sizes: Unpack[FeatureSizes]) -> None:
        super().__init__(**sizes)
        d, wanted = self.dim_head, sizes["num_features"]
        if wanted not in (None, d):
            raise ValueError(f"linear attention has dim_head ({d}) features: leave num_features null, not {wanted}")
        self.num_features = d
        self.register_buffer("identity", torch.eye(d).repeat(self.key_heads, 1, 1), persistent=False)

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return exp(x) for both sides."""
        both = Exponential((widen(self.identity),))
        return both, both
