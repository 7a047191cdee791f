"""The options of a softmax attention, checked once and asked for one block of scores at a time.

Every softmax op (exact, chunked, tiled, SDPA) asks the same `Terms` for the block (rows, cols) it works on, so an
option means the same in all of them and none needs an n x n matrix to say it.

Letters: `b` batch (all leading dimensions folded into one), `h` heads, `g` key heads, `i` queries, `j` keys, `d` head
width, `e` value width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import TypedDict

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.ops.checks import Shape, check_bias, check_pair_mask, check_per_key, check_shapes
from performer_lm.ops.hashing import keep_mask
from performer_lm.ops.precision import high_low, precise, running_sum

Block = Callable[[slice, slice], Tensor]
"""A function of (query slice, key slice) that returns that block, broadcastable to `(..., h, rows, cols)`."""

ALL = slice(None)


class Options(TypedDict, total=False):
    """The keyword options of every softmax op; `exact_attention` says what each means."""

    causal: bool
    window: int | None
    mask: Tensor | Block | None
    key_mask: Tensor | None
    bias: Tensor | Block | None
    segments: Tensor | None
    log_decay: Tensor | None
    scale: float | None
    dropout: float
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The options of one attention call, checked and folded."""

    batch: tuple[int, ...]
    heads: int
    groups: int
    queries: int
    keys: int
    causal: bool
    window: int | None
    mask: Tensor | Block | None  # (b h i j) bool, or what broadcasts to it
    bias: Tensor | Block | None  # (b h i j), or what broadcasts to it
    key_mask: Tensor | None  # (b j) bool
    segments: Tensor | None  # (b j)
    decay: Tensor | None  # (b g j): sum of log_decay over the keys after each one
    positions: Tensor | None  # (b j): number of kept keys up to each one
    scale: float
    dropout: float
    seed: int

    @property
    def may_hide_rows(self) -> bool:
        """Whether a query may see no key at all."""
        starts_before_keys = (self.causal or self.window is not None) and self.queries > self.keys
        return starts_before_keys or any(term is not None for term in (self.mask, self.key_mask, self.bias))

    def rows_at(self, rows: slice) -> slice:
        """Return the places among the keys where the queries `rows` stand."""
        start, stop, _ = rows.indices(self.queries)
        return slice(start + self.keys - self.queries, stop + self.keys - self.queries)

    def is_empty(self, rows: slice, cols: slice) -> bool:
        """Tell, from what the host knows, whether no query of `rows` can see a key of `cols`."""
        at, (start, stop, _) = self.rows_at(rows), cols.indices(self.keys)
        if self.causal and start > at.stop - 1:
            return True
        if self.window is None or self.positions is not None:
            return False
        too_old = at.start - (stop - 1) >= self.window
        too_new = not self.causal and start - (at.stop - 1) >= self.window
        return too_old or too_new

    def hidden(self, rows: slice, cols: slice, device: torch.device) -> Tensor | None:
        """Return True where a score of the block is hidden, broadcastable to `(b, h, rows, cols)`; None if none is."""
        parts = self._hidden_by_place(rows, cols, device)
        if self.window is not None and self.positions is not None:
            queries = self._at_rows(self.positions, self.rows_at(rows))[..., None]
            parts.append((queries - self.positions[:, None, None, cols]).abs() >= self.window)
        if self.key_mask is not None:
            parts.append(~self.key_mask[:, None, None, cols])
        if self.segments is not None:
            queries = self._at_rows(self.segments, self.rows_at(rows))[..., None]
            parts.append(queries != self.segments[:, None, None, cols])
        if self.mask is not None:
            parts.append(~self.block(self.mask, rows, cols, check=check_pair_mask))
        return reduce(torch.logical_or, parts) if parts else None

    def _hidden_by_place(self, rows: slice, cols: slice, device: torch.device) -> list[Tensor]:
        """Return what causal and window hide from the block, as far as places alone tell: `(rows, cols)` each."""
        at, (start, stop, _) = self.rows_at(rows), cols.indices(self.keys)
        everything = torch.ones(at.stop - at.start, stop - start, dtype=torch.bool, device=device)
        own, parts = at.start - start, []  # the diagonal of the block where a query meets its own key
        if self.causal and stop - 1 > at.start:
            parts.append(everything.triu(own + 1))
        if self.window is not None and self.positions is None:
            parts.append(everything.tril(own - self.window))
            if not self.causal:
                parts.append(everything.triu(own + self.window))
        return parts

    def add_to(self, scores: Tensor, rows: slice, cols: slice, *, unit: float = 1.0) -> Tensor:
        """Add `unit` times the block's bias and decay to `scores` `(b, h, rows, cols)` in place; hidden become -inf."""
        if self.bias is not None:
            scores.add_(self.block(self.bias, rows, cols, check=check_bias), alpha=unit)
        if self.decay is not None:
            older, newer = self.decay[:, :, None, cols], self._at_rows(self.decay, self.rows_at(rows))[..., None]
            grouped = rearrange(scores, "b (g r) i j -> b g r i j", g=self.decay.shape[1])
            for key_part, query_part in zip(high_low(older, scores.dtype), high_low(newer, scores.dtype), strict=True):
                grouped.add_((key_part - query_part)[:, :, None], alpha=unit)
            # the same memory: autograd does not follow writes through one view of what needed no gradient to another
            scores = rearrange(grouped, "b g r i j -> b (g r) i j")
        hidden = self.hidden(rows, cols, scores.device)
        return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)

    def kept(self, weights: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return what dropout multiplies a block `(b, h, rows, cols)` by: 0, or 1 over the chance to stay."""
        places = (range(*part.indices(size)) for part, size in ((rows, self.queries), (cols, self.keys)))
        batch, heads, device = *weights.shape[:2], weights.device
        mask = keep_mask(self.seed, self.dropout, batch, heads, *places, device=device)
        return mask.to(weights.dtype).div_(1.0 - self.dropout)

    def _at_rows(self, per_key: Tensor, at: slice) -> Tensor:
        """Take the queries' own entries of `(b, j)` or `(b, g, j)` as `(b, 1 | g, rows)`."""
        taken = per_key[..., at]
        return taken if per_key.ndim == 3 else taken[:, None]

    def block(
        self, whole: Tensor | Block, rows: slice, cols: slice, *, check: Callable[[Tensor, Shape], Tensor]
    ) -> Tensor:
        """Return one block of a mask or bias with batch folded: `(b | 1, h | 1, rows | 1, cols | 1)`.

        `check` is `check_pair_mask` or `check_bias`, for what a function returns; a tensor has been checked as a whole.
        """
        if isinstance(whole, Tensor):
            return slice_block(whole, rows, cols)
        sizes = (len(range(*part.indices(size))) for part, size in ((rows, self.queries), (cols, self.keys)))
        return fold(check(whole(rows, cols), (*self.batch, self.heads, *sizes)), self.batch)


def gather_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | Block | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | Block | None = None,
    segments: Tensor | None = None,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Terms:
    """Check q `(..., h, i, d)`, k `(..., g, j, d)`, v `(..., g, j, e)` and the options, and return them as `Terms`."""
    check_shapes(q, k, v)
    batch, (groups, keys), queries = tuple(q.shape[:-3]), k.shape[-3:-1], q.shape[-2]
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if dropout > 0.0 and seed is None:
        raise ValueError(f"dropout ({dropout}) needs a seed: it is a function of (seed, b, h, i, j)")
    if log_decay is not None and not causal:
        raise ValueError("log_decay needs causal=True: a key fades as it grows older")
    key_mask = check_per_key(k, mask=key_mask, segments=segments, log_decay=log_decay, name="key_mask")
    pairs = (*q.shape[:-1], keys)
    counts_places = segments is not None or log_decay is not None or (window is not None and key_mask is not None)
    if counts_places and queries > keys:
        raise ValueError(f"segments, log_decay and window need each query among the keys: {queries} > {keys}")

    key_mask = None if key_mask is None else fold_batch(key_mask, 1)
    return Terms(
        batch=batch,
        heads=q.shape[-3],
        groups=groups,
        queries=queries,
        keys=keys,
        causal=causal,
        window=window,
        mask=fold(check_pair_mask(mask, pairs), batch) if isinstance(mask, Tensor) else mask,
        bias=fold(check_bias(bias, pairs), batch) if isinstance(bias, Tensor) else bias,
        key_mask=key_mask,
        segments=None if segments is None else fold_batch(segments, 1),
        decay=None if log_decay is None else sum_of_newer(fold_batch(log_decay, 2), key_mask),
        positions=None if window is None or key_mask is None else key_mask.cumsum(-1),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout=dropout,
        seed=0 if seed is None else seed,
    )


def sum_of_newer(log_decay: Tensor, key_mask: Tensor | None) -> Tensor:
    """Sum `log_decay` `(b, g, j)` over the keys after each one; a masked key counts 0.

    Key j weighs exp(sum[j] - sum[i]) at query i. Counted from the end and in float64 (where the device has it), so that
    the difference of two neighbours stays exact however long the stream.
    """
    if key_mask is not None:
        log_decay = log_decay.masked_fill(~key_mask[:, None], 0.0)
    wide = log_decay.to(precise(log_decay.device))
    return running_sum(wide.flip(-1)).flip(-1) - wide


def slice_block(whole: Tensor, rows: slice, cols: slice) -> Tensor:
    """View the block of `(..., i | 1, j | 1)`; a dimension of one is broadcast and stays whole."""
    rows, cols = (ALL if size == 1 else part for size, part in zip(whole.shape[-2:], (rows, cols), strict=True))
    return whole[..., rows, cols]


def add_block(whole: Tensor, block: Tensor, rows: slice, cols: slice) -> None:
    """Add `block` `(b, h, rows, cols)` to its place in `whole`, summed over what `whole` broadcasts."""
    place = slice_block(whole, rows, cols)
    place += block.sum_to_size(place.shape)


def slices(length: int, size: int) -> Iterator[slice]:
    """Cut `length` places into slices of `size`; the last may be shorter."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def fold(block: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Fold the leading dimensions of a mask or bias, `(..., h, i, j)` or anything that broadcasts to it, into one."""
    if block.ndim < 4:
        return block[(None,) * (4 - block.ndim)]
    return block if len(batch) == 1 else block.expand(*batch, *block.shape[-3:]).flatten(0, len(batch) - 1)


def fold_batch(x: Tensor, last: int) -> Tensor:
    """Fold all dimensions but the `last` ones into one; there may be none, and any may be empty."""
    return x[None].flatten(0, x.ndim - last)


def fold_heads(q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Fold the leading dimensions of q, k and v into one `b` and widen to `dtype`."""
    return fold_batch(q, 3).to(dtype), fold_batch(k, 3).to(dtype), fold_batch(v, 3).to(dtype)
