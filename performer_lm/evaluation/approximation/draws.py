"""The errors against softmax of more or fewer features, and of other draws.

Letters: `h` heads, `m` features.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from torch import nn

from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.feature_maps import RandomFeatures
from performer_lm.evaluation.approximation.layer import Approximation, measure_approximation
from performer_lm.evaluation.approximation.model import Vectors, favor_layers, watch


class Finding(NamedTuple):
    """Errors of one set of features on one layer's vectors."""

    layer: str
    num_features: int
    draw: int | None
    """Redraw index of the features; None for those that the model runs."""
    measures: Approximation
    """Each `(h,)`, over the layer's FAVOR heads."""


def is_drawn(attention: FavorAttention) -> bool:
    """Return True for features of a projection that is drawn, and not trained."""
    features = attention.features
    return isinstance(features, RandomFeatures) and not isinstance(features.projection, nn.Parameter)


def redrawn(attention: FavorAttention, *, num_features: int, index: int) -> FavorAttention:
    """Return a backend with `num_features` features of redraw `index`, and the learned centres and averages of another.

    With the numbers of the original it has the original's projection, bit for bit.

    Raises:
        ValueError: for features that are not drawn, or an odd number of those that come in pairs.
    """
    features: Any = deepcopy(attention.features)
    if not is_drawn(attention):
        raise ValueError(f"attn/features={features.choice} of layer {attention.layer} are not drawn, so not drawn anew")
    draws, odd = divmod(num_features * features.projection.shape[1], features.num_features)
    if num_features < 1 or odd:
        wanted = "even and at least 2" if features.projection.shape[1] < features.num_features else "at least 1"
        raise ValueError(f"num_features of attn/features={features.choice} must be {wanted}, got {num_features}")
    features.projection = features.draw(draws, index=index).to(features.projection)
    features.num_features, features.index = num_features, index
    return FavorAttention(
        **attention.sizes,
        features=lambda **sizes: features,
        num_features=num_features,
        seed=features.seed,
        redraw_interval=None,
        redraw_until=None,
        chunk_size=attention.chunk_size,
    )


def measure_draws(
    model: nn.Module,
    run: Callable[[], object],
    *,
    num_features: Sequence[int],
    redraws: int,
    queries: int | None,
    advance: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Measure every FAVOR layer's features, and `redraws` other draws of each number of features.

    All are compared on the same vectors, those of the model as it is, when `run` runs it. The draws are those of the
    redraw indices from 1 on after the model's own. Layers whose features are not drawn are measured as they are only.
    `queries` as of `measure_approximation`; `advance` is called after each of `count_measurements`.
    """
    found: list[Finding] = []

    def look(layer: str, attention: FavorAttention, vectors: Vectors, more: dict[str, Any]) -> None:
        own: Any = attention.features
        found.append(Finding(layer, own.num_features, None, measure(attention, vectors, more)))
        for count in num_features if is_drawn(attention) else ():
            for index in range(own.index + 1, own.index + 1 + redraws):
                other = redrawn(attention, num_features=count, index=index)
                found.append(Finding(layer, count, index, measure(other, vectors, more)))

    def measure(attention: FavorAttention, vectors: Vectors, more: dict[str, Any]) -> Approximation:
        measures = measure_approximation(attention, *vectors, queries=queries, **more)
        advance()
        return Approximation(*(x.cpu() for x in measures))

    watch(model, look, run)
    return found


def count_measurements(model: nn.Module, *, num_features: Sequence[int], redraws: int) -> int:
    """Return how many measurements `measure_draws` takes."""
    more = len(num_features) * redraws
    return sum(1 + more * is_drawn(attention) for attention in favor_layers(model).values())
