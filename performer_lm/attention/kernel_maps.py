"""Feature maps of other kernels than softmax, or of softmax without random positive features.

Letters: `b` batch, `g` key heads, `n` tokens, `d` head width, `m` features.
"""

import torch
from torch import Tensor, nn

from performer_lm.attention.feature_maps import AttentionFeatures, RandomFeatures, count_features
from performer_lm.ops.features import ACTIVATIONS, POSITIVE
from performer_lm.ops.hashing import mix_seed
from performer_lm.ops.maps import Exponential, FeatureMap, Generalized, Taylor, Trigonometric
from performer_lm.ops.projections import haar
from performer_lm.ranges import Count, NotNegative, ranged


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@ranged
class GeneralizedFeatures(RandomFeatures):
    """The kernel E f(w.x) f(w.y): features f(W x) + epsilon of x = q d^-1/4 (2009.14794, eq. 5).

    Args:
        heads: query heads; those of one key head share its projection.
        key_heads: key heads.
        dim_head: `d`.
        num_features: `m`; None takes d ln d.
        layer: the layer's number.
        seed: of the projections.
        coupling: `orthogonal`, `simplex` or `iid`.
        regularized: rows of norm sqrt(d).
        activation: f, by name.
        epsilon: added to every feature, so that no token is without weight.

    Raises:
        ValueError: for an unknown activation, or a negative epsilon.
    """

    def __init__(
        self,
        *,
        heads: int,
        key_heads: int,
        dim_head: int,
        num_features: Count | None,
        layer: int,
        seed: int,
        coupling: str,
        regularized: bool,
        activation: str,
        epsilon: NotNegative,
    ) -> None:
        del heads
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        count = count_features(dim_head, num_features)
        super().__init__(
            key_heads=key_heads,
            dim_head=dim_head,
            num_draws=count,
            layer=layer,
            seed=seed,
            coupling=coupling,
            regularized=regularized,
        )
        self.num_features = count
        self.signed = activation not in POSITIVE
        self.activation, self.epsilon = activation, epsilon

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return f(W x) + epsilon for both sides."""
        weight = _wide(self.projection) * self.dim_head**-0.25
        both = Generalized((weight,), activation=self.activation, epsilon=self.epsilon)
        return both, both


@ranged
class TrigonometricFeatures(RandomFeatures):
    """Softmax by exp(|x|^2 / 2) [cos w.x, sin w.x] (2009.14794, eq. 4): unbiased but signed, for study.

    Args:
        heads: query heads; those of one key head share its projection.
        key_heads: key heads.
        dim_head: `d`.
        num_features: `m`, even: a cosine and a sine of each draw; None takes d ln d.
        layer: the layer's number.
        seed: of the projections.
        coupling: `orthogonal`, `simplex` or `iid`.
        regularized: rows of norm sqrt(d).
    """

    signed = True

    def __init__(
        self,
        *,
        heads: int,
        key_heads: int,
        dim_head: int,
        num_features: Count | None,
        layer: int,
        seed: int,
        coupling: str,
        regularized: bool,
    ) -> None:
        del heads
        count = count_features(dim_head, num_features, pairs=True)
        super().__init__(
            key_heads=key_heads,
            dim_head=dim_head,
            num_draws=count // 2,
            layer=layer,
            seed=seed,
            coupling=coupling,
            regularized=regularized,
        )
        self.num_features = count

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return the same map for both sides."""
        both = Trigonometric((_wide(self.projection),), scale=self.dim_head**-0.25)
        return both, both


@ranged
class TaylorFeatures(AttentionFeatures):
    """The kernel 1 + s + s^2 / 2 of s = x.y, the first terms of e^s (Based, 2402.18668): no exponential, no sampling.

    `d'` numbers give 1 + d' + d' (d' + 1) / 2 features; x is projected to as many of them as fit in `num_features`, by
    a learned matrix that starts as a random rotation and keeps x.y on average.

    Args:
        heads: query heads; those of one key head share its matrix.
        key_heads: key heads.
        dim_head: `d`.
        num_features: room for features; None takes d' = d, without a projection.
        layer: the layer's number.
        seed: of the initial rotation.
    """

    def __init__(
        self, *, heads: int, key_heads: int, dim_head: int, num_features: Count | None, layer: int, seed: int
    ) -> None:
        del heads
        super().__init__(key_heads=key_heads, dim_head=dim_head)
        width = dim_head
        if num_features is not None:
            fitting = [w for w in range(1, dim_head + 1) if _count_taylor(w) <= num_features]
            if not fitting:
                raise ValueError(f"taylor2 needs num_features of at least {_count_taylor(1)}, got {num_features}")
            width = fitting[-1]
        self.num_features = _count_taylor(width)
        self.projection = None
        if width < dim_head:
            self.projection = nn.Parameter(torch.empty(key_heads, width, dim_head))
            if not self.projection.is_meta:
                generator = torch.Generator(device="cpu").manual_seed(mix_seed(seed, layer))
                rotation = haar(key_heads, dim_head, generator=generator)[:, :width] * (dim_head / width) ** 0.5
                self.projection.data.copy_(rotation)

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return the map of x = q d^-1/4 for both sides."""
        scale = self.dim_head**-0.25
        both = Taylor((), scale=scale) if self.projection is None else Taylor((_wide(self.projection) * scale,))
        return both, both


def _count_taylor(width: int) -> int:
    return 1 + width + width * (width + 1) // 2


@ranged
class IdentityFeatures(AttentionFeatures):
    """softmax(q) over features and exp(k): efficient attention, without random features (1812.01243).

    Keys are exponentiated in log space, so no key overflows; the softmax over a query's features is what normalised
    attention does of itself.

    Args:
        heads: query heads.
        key_heads: key heads.
        dim_head: `d`, which is also the number of features.
        num_features: must be None or `d`.
        layer: unused, as nothing is drawn.
        seed: unused, as nothing is drawn.
    """

    identity: Tensor

    def __init__(
        self, *, heads: int, key_heads: int, dim_head: int, num_features: Count | None, layer: int, seed: int
    ) -> None:
        del heads, layer, seed
        super().__init__(key_heads=key_heads, dim_head=dim_head)
        if num_features not in (None, dim_head):
            raise ValueError(
                f"linear attention has dim_head ({dim_head}) features: leave num_features null, not {num_features}"
            )
        self.num_features = dim_head
        self.register_buffer("identity", torch.eye(dim_head).repeat(key_heads, 1, 1), persistent=False)

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return exp(x) for both sides."""
        both = Exponential((_wide(self.identity),))
        return both, both
