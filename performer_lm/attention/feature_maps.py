"""Feature maps as modules: the constants that FAVOR attention draws, learns or measures for its maps.

Each module owns the constants of one layer and hands the engine two `FeatureMap`s, one for queries and one for keys.
Vectors arrive unscaled; maps for softmax work on x = q d^-1/4, so that x.y = q.k / sqrt d.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `d` head width, `m` features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Self, TypedDict, Unpack

import torch
from annotated_types import Gt, Le
from einops import einsum, rearrange
from torch import Tensor, nn

from performer_lm.ops.maps import Exponential, FeatureMap, optimal_damping
from performer_lm.ops.precision import widen
from performer_lm.ops.projections import default_num_features, draw_projection
from performer_lm.ranges import Count, ranged
from performer_lm.wording import snake_case


class FeatureSizes(TypedDict):
    """The arguments that `FavorAttention` gives to every factory of a feature map."""

    heads: int
    key_heads: int
    dim_head: int
    num_features: Count | None
    layer: int
    seed: int


class DrawOptions(FeatureSizes):
    """The arguments of every map built on a random projection."""

    coupling: str
    regularized: bool


class Prepared(NamedTuple):
    """Queries and keys as the maps take them, and the number added to the log features of each key."""

    q: Tensor  # (b, h, i, d)
    k: Tensor  # (b, g, j, d)
    log_gain: Tensor | None  # (b, g, j)


@ranged
class AttentionFeatures(nn.Module, ABC):
    """The feature map of one attention layer.

    Args:
        heads: query heads; those of one key head share its map.
        key_heads: key heads.
        dim_head: `d`.
        num_features: `m`; None takes d ln d, unless the map says otherwise.
        layer: the layer's number, so that the draws of two layers differ.
        seed: of the draws.
    """

    backend: str = "favor"
    """The name in `attn=` of the backend whose features these are."""

    signed: bool = False
    """Whether weights may be negative: then outputs are no averages, a denominator may vanish, causal use is refused.
    """

    redrawn: bool = False
    """Whether there is a projection that can be drawn anew."""

    observes: bool = False
    """Whether training batches are measured: whether `observe` does anything."""

    fixed: bool = False
    """Whether `redraw` leaves the projection alone from now on; checkpoints keep this."""

    def __init__(
        self, *, heads: int, key_heads: int, dim_head: int, num_features: Count | None, layer: int, seed: int
    ) -> None:
        super().__init__()
        self.group, self.key_heads, self.dim_head = heads // key_heads, key_heads, dim_head
        self.layer, self.seed = layer, seed
        self.num_features = default_num_features(dim_head) if num_features is None else num_features

    @property
    def choice(self) -> str:
        """Return the name of the features in `attn/features=`."""
        return snake_case(type(self).__name__.removesuffix("Features"))

    @abstractmethod
    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return the maps of queries and of keys, with tensors `(g, ...)`."""

    def prepare(self, q: Tensor, k: Tensor) -> Prepared:
        """Shift queries `(b, h, i, d)` and keys `(b, g, j, d)` before the maps, which most features do not."""
        return Prepared(q, k, None)

    def observe(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Measure a training batch. The measure counts from the next `settle` on, never at once."""

    def settle(self) -> None:
        """Take in the batches that were observed; to be called between optimizer steps only."""

    def redraw(self, index: int) -> None:
        """Draw the projection of redraw `index`. Maps that draw nothing have none."""


class RandomFeatures(AttentionFeatures):
    """A map built on a random projection `(g, draws, d)`, which checkpoints keep, with (seed, index).

    Args:
        coupling: of the rows: `orthogonal`, `simplex` or `iid` (`draw_projection`).
        regularized: rows of norm sqrt(d): a kernel gentler on large scores (SMREG).
        pairs: whether each row gives two features, so that `m` must be even.
        learned: train the projection, from its first draw on; it is never redrawn.
        sizes: those of `AttentionFeatures`.
    """

    projection: Tensor

    def __init__(
        self,
        *,
        coupling: str,
        regularized: bool,
        pairs: bool = False,
        learned: bool = False,
        **sizes: Unpack[FeatureSizes],
    ) -> None:
        super().__init__(**sizes)
        if pairs and self.num_features % 2:
            if sizes["num_features"] is not None:
                raise ValueError(f"features that come in pairs need an even num_features, got {self.num_features}")
            self.num_features += 1
        self.coupling, self.regularized = coupling, regularized
        self.index, self.redrawn = 0, not learned
        projection = torch.empty(self.key_heads, self.num_features // (2 if pairs else 1), self.dim_head)
        if learned:
            self.projection = nn.Parameter(projection)
        else:
            self.register_buffer("projection", projection)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        if self.projection.is_meta:
            return  # there are no values to set
        self.projection.copy_(self.draw(self.projection.shape[1], index=self.index))

    def draw(self, count: int, *, index: int) -> Tensor:
        """Return the `count` rows per key head of redraw `index`, `(g, count, d)`; the projection stays."""
        g, _, d = self.projection.shape
        return draw_projection(
            g,
            count,
            d,
            seed=self.seed,
            layer=self.layer,
            index=index,
            coupling=self.coupling,
            regularized=self.regularized,
        )

    def redraw(self, index: int) -> None:
        """Draw anew unless the projection is that of `index` already, learned or fixed."""
        if index != self.index and not self.fixed and self.redrawn:
            self.index = index
            self._draw()

    def get_extra_state(self) -> Tensor:
        """Return (seed, redraw index, whether fixed) for checkpoints."""
        return torch.tensor([self.seed, self.index, int(self.fixed)], device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Take over the seed and index of a checkpoint, whose projection comes with them."""
        self.seed, self.index, fixed = state.tolist()
        self.fixed = bool(fixed)


@ranged
class SoftmaxFeatures(RandomFeatures):
    """The softmax kernel by exp(A |w|^2 + B w.x - |x|^2 / 2): FAVOR+, hyperbolic, FAVOR++ and learned features in one.

    Args:
        antithetic: features in pairs of w and -w, from m / 2 draws (hyperbolic: 2009.14794, lemma 1).
        learned: train the projection, from its first draw on; it is never redrawn.
        centred: learn constants a, b per key head and map q - a and k - b. With a gain of a.k for the keys that changes
            no softmax weight, but it shortens what the features see.
        momentum: of the running average of |x + y|^2 over training batches, from which A follows (FAVOR++, 2205.15317).
            It starts at 0, where A = 0, moves between optimizer steps only, and is frozen at evaluation. None leaves
            A = 0, which is FAVOR+.
        drawn: those of `RandomFeatures` and `AttentionFeatures`.

    Raises:
        ValueError: for an odd number of antithetic features, or a momentum outside (0, 1].
    """

    mean_square: Tensor
    pending: Tensor

    def __init__(
        self,
        *,
        antithetic: bool,
        learned: bool,
        centred: bool,
        momentum: Annotated[float, Gt(0), Le(1)] | None,
        **drawn: Unpack[DrawOptions],
    ) -> None:
        super().__init__(pairs=antithetic, learned=learned, **drawn)
        self.antithetic, self.momentum = antithetic, momentum
        self.centres = nn.Parameter(torch.zeros(2, self.key_heads, self.dim_head)) if centred else None
        if momentum is not None:
            self.observes = True
            self.register_buffer("mean_square", torch.zeros(self.key_heads))
            self.register_buffer("pending", torch.zeros(2, self.key_heads), persistent=False)  # sum, count

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the running average in float32 at least: in bfloat16 small steps round away."""
        super()._apply(fn, recurse)
        if self.momentum is not None:
            self.mean_square, self.pending = widen(self.mean_square), widen(self.pending)
        return self

    @property
    def choice(self) -> str:
        """Return the name in `attn/features=` of the options that tell these features from the others."""
        if self.observes or not self.redrawn:
            return "optimal" if self.observes else "learned"
        return "hyperbolic" if self.antithetic else "positive"

    def maps(self) -> tuple[FeatureMap, FeatureMap]:
        """Return one map for both sides, but for the norm |x|^2 / 2, which cancels in a query and is left out."""
        rows = widen(self.projection)
        rows = torch.cat([rows, -rows], dim=1) if self.antithetic else rows
        scale = self.dim_head**-0.25
        tensors: tuple[Tensor, ...] = (rows,)
        if self.momentum is not None:
            damping = optimal_damping(self.mean_square.to(rows.dtype), self.dim_head)[:, None]
            tensors = (rows * (1.0 - 4.0 * damping[..., None]).sqrt(), damping * rows.square().sum(dim=-1))
        return Exponential(tensors, scale=scale), Exponential(tensors, scale=scale, norm=0.5 * scale * scale)

    def prepare(self, q: Tensor, k: Tensor) -> Prepared:
        """Subtract the learned centres, if any, and add the difference in scores to the log features of keys."""
        if self.centres is None:
            return Prepared(q, k, None)
        a, b = self.centres.to(q.dtype)
        gain = einsum(a, k, "g d, b g j d -> b g j") * self.dim_head**-0.5
        return Prepared(q - a.repeat_interleave(self.group, dim=0)[:, None], k - b[:, None], gain)

    @torch.no_grad()
    def observe(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Add the mean of |x + y|^2 over one batch to the pending sum of the next `settle`."""
        q, k, _ = self.prepare(q, k)
        x = rearrange(q, "b (g r) i d -> g d (b r i)", g=self.key_heads).float()
        y = rearrange(k, "b g j d -> g d b j").float()
        kept = torch.ones_like(y[0, 0]) if mask is None else mask.to(y.dtype)
        weight = kept / kept.sum().clamp(min=1.0)
        y_mean, y_square = (y * weight).sum(dim=(2, 3)), (y.square() * weight).sum(dim=(1, 2, 3))
        found = x.square().sum(dim=1).mean(dim=-1) + y_square + 2.0 * (x.mean(dim=-1) * y_mean).sum(dim=-1)
        self.pending += torch.stack([found * self.dim_head**-0.5, torch.ones_like(found)])

    @torch.no_grad()
    def settle(self) -> None:
        """Move the running average by the batches observed since the last call."""
        if self.momentum is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.pending)  # every rank has seen other batches, and all go on alike
        total, count = self.pending
        step = self.momentum * (total / count.clamp(min=1.0) - self.mean_square)
        self.mean_square += step * (count > 0)
        self.pending.zero_()
