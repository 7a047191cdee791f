"""Queries and keys of a layer in pairs: the weights that features give them, and those of softmax.

Queries are compared a block at a time, so memory does not grow with the context.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `i` queries, `j` keys, `d` head width, `m`
features.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple, TypedDict

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.attention.favor import FavorAttention
from performer_lm.ops.maps import FeatureMap, Features
from performer_lm.ops.precision import precise
from performer_lm.ops.terms import slices
from performer_lm.ranges import Count, ranged

BLOCK = 1 << 22
"""Numbers that a block of pairs times features may hold."""
TINY = 1e-290
"""The least float64 sum of squares that is to be trusted: what underflows beside it does not count."""


class Block(NamedTuple):
    """Weights of keys for some queries, `(b, h, i, j)` each."""

    implied: Tensor
    exact: Tensor
    faded: Tensor  # weights without q and k
    effective: Tensor
    visible: Tensor


class Sight(TypedDict, total=False):
    """Which keys a query sees, and how well."""

    causal: bool
    """End-aligned; the default."""
    mask: Tensor | None
    """`(b, j)` bool, True keeps."""
    segments: Tensor | None
    """`(b, j)` document ids of the keys; the queries are the last i of them."""
    log_decay: Tensor | None
    """`(b, g, j)`: how keys fade."""


@ranged
class Pairs:
    """All queries and keys of a layer, to be compared a block of queries at a time."""

    def __init__(
        self,
        attention: FavorAttention,
        q: Tensor,
        k: Tensor,
        *,
        queries: Count | None = None,
        causal: bool = True,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        log_decay: Tensor | None = None,
    ) -> None:
        self.rows = rows = _spaced(q.shape[2], queries).to(q.device)
        self.q, self.k = q[:, :, rows], k
        self.causal, self.mask, self.segments = causal, mask, segments
        self.places = rows + (k.shape[2] - q.shape[2])  # of the queries among the keys
        self.total = None if log_decay is None else log_decay.double().cumsum(dim=-1)
        prepared = attention.features.prepare(self.q, k)
        query_map, key_map = (a_map.to(q.dtype) for a_map in attention.features.maps())
        self.queries = _features(query_map, prepared.q, k.shape[1])
        self.keys = _features(key_map, prepared.k, k.shape[1])
        if prepared.log_gain is not None and self.keys.log_scale is not None:
            gain = prepared.log_gain[:, :, None, :, None]
            self.keys = self.keys._replace(log_scale=self.keys.log_scale + gain)

    def blocks(self) -> Iterator[Block]:
        """Compare as many queries at a time as fit, with all keys."""
        a_row = self.q.shape[0] * self.q.shape[1] * self.k.shape[2]
        for rows in slices(len(self.rows), max(1, BLOCK // (8 * a_row))):
            yield self._compare(rows)

    def _compare(self, rows: slice) -> Block:
        group = self.q.shape[1] // self.k.shape[1]
        visible = self._visible(rows)
        hidden = ~visible
        fading = self._fading(rows)
        scores = self.q[:, :, rows] @ self.k.repeat_interleave(group, dim=1).mT * self.q.shape[-1] ** -0.5
        total, size, squares, peak = self._products(rows)
        logs = (peak + fading).masked_fill(hidden, -torch.inf)
        seen = total * (logs - logs.amax(dim=-1, keepdim=True).clamp(min=-1e30)).exp()
        mass = seen.sum(dim=-1, keepdim=True)
        return Block(
            implied=(seen / mass.masked_fill(mass == 0, 1.0)).to(scores.dtype),
            exact=_softmax(scores + fading, hidden),
            faded=_softmax(fading.expand_as(scores), hidden),
            effective=(size.square() / squares.masked_fill(squares == 0, 1.0)).to(scores.dtype),
            visible=visible.expand_as(scores),
        )

    def _products(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return sums over features of products, their sizes and squares, over exp(peak), and the peak."""
        found = _multiply(self.queries, self.keys, rows)
        if self.keys.log_scale is not None and bool((found[2] < TINY).any()):
            return self._products_one_by_one(rows)
        total, size, squares, peak = (rearrange(x, "b g r i j -> b (g r) i j") for x in found)
        return total, size, squares, peak

    def _products_one_by_one(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the same where features lie too far apart for one scale: each pair at its own."""
        b, h, j = self.q.shape[0], self.q.shape[1], self.k.shape[2]
        m = next(x for x in self.keys if x is not None).shape[-1]
        columns = max(1, BLOCK // (b * h * (rows.stop - rows.start) * m))
        found = []
        for cols in slices(j, columns):
            terms, peak = _terms(self.queries, self.keys, rows, cols)
            sums = (terms.sum(dim=-1), terms.abs().sum(dim=-1), terms.square().sum(dim=-1), peak)
            found.append([rearrange(x, "b g r i j -> b (g r) i j") for x in sums])
        total, size, squares, peak = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        return total, size, squares, peak

    def _visible(self, rows: slice) -> Tensor:
        """Return `(b or 1, 1, i, j)`: True where a query sees a key."""
        own, keys = self.places[rows, None], torch.arange(self.k.shape[2], device=self.k.device)
        visible = (keys <= own if self.causal else torch.ones_like(keys <= own))[None, None]
        if self.mask is not None:
            visible = visible & self.mask[:, None, None]
        if self.segments is not None:
            visible = visible & (self.segments[:, None, self.places[rows], None] == self.segments[:, None, None])
        return visible

    def _fading(self, rows: slice) -> Tensor:
        """Return the log weights of decay, `(b, h, i, j)` or `(1, 1, 1, 1)`."""
        if self.total is None:
            return self.q.new_zeros(1, 1, 1, 1)
        lag = (self.total[:, :, self.places[rows], None] - self.total[:, :, None]).clamp(max=0.0)
        return lag.to(self.q.dtype).repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)


def where_precise(attention: FavorAttention, tensors: tuple[Tensor, ...], sight: Sight) -> tuple[Any, ...]:
    """Return all three where float64 exists: as they are, or, from a device without it, on the host."""
    if precise(tensors[0].device) == torch.float64:
        return attention, tensors, sight
    moved = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in sight.items()}
    return deepcopy(attention).cpu(), tuple(x.cpu() for x in tensors), moved


def _features(a_map: FeatureMap, x: Tensor, g: int) -> Features:
    """Map vectors `(b, g r, n, d)` to features `(b, g, r, n, m)`."""
    flat = rearrange(x, "b (g r) n d -> g (b r n) d", g=g)
    values, logs = a_map(flat)
    gain = a_map.gain(flat)
    if logs is not None and gain is not None:
        logs = logs + gain[..., None].to(logs.dtype)
    shape = {"b": x.shape[0], "n": x.shape[2]}
    return Features(
        *(None if part is None else rearrange(part, "g (b r n) m -> b g r n m", **shape) for part in (values, logs))
    )


def _multiply(queries: Features, keys: Features, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `Pairs._products` by matrix products, every query and every key at a scale of its own."""
    one, high = _scaled(Features(*(None if part is None else part[..., rows, :] for part in queries)))
    other, low = _scaled(keys)
    total, squares = one @ other.mT, one.square() @ other.square().mT
    size = total if queries.values is None else one.abs() @ other.abs().mT
    return total, size, squares, high[..., :, None] + low[..., None, :]


def _scaled(features: Features) -> tuple[Tensor, Tensor]:
    """Return features `(..., n, m)` in float64 over exp(scale), and the scale `(..., n)`."""
    values, logs = (None if part is None else part.double() for part in features)
    if logs is None:
        assert values is not None
        return values, values.new_zeros(values.shape[:-1])
    scale = logs.amax(dim=-1)
    weights = (logs - scale[..., None]).exp()
    return weights if values is None else weights * values, scale


def _terms(queries: Features, keys: Features, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
    """Return products feature by feature, over exp(peak): `(b, g, r, i, j, m)` and `(b, g, r, i, j)`."""
    values = None
    if queries.values is not None and keys.values is not None:
        values = queries.values[..., rows, None, :] * keys.values[..., None, cols, :]
    if queries.log_scale is None or keys.log_scale is None:
        assert values is not None
        return values, values.new_zeros(values.shape[:-1])
    logs = queries.log_scale[..., rows, None, :] + keys.log_scale[..., None, cols, :]
    peak = logs.amax(dim=-1)
    weights = logs.sub_(peak[..., None]).exp_()
    return weights if values is None else weights * values, peak


def _softmax(logs: Tensor, hidden: Tensor) -> Tensor:
    """Return the softmax over keys, all zeros for queries that see none."""
    return logs.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0.0)


def _spaced(count: int, wanted: int | None) -> Tensor:
    """Return `wanted` places of `count`, evenly spaced, the last among them."""
    if wanted is None or wanted >= count:
        return torch.arange(count, device="cpu")
    return (torch.arange(1, wanted + 1, device="cpu") * count).div(wanted, rounding_mode="floor") - 1
