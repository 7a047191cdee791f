"""The options of a softmax attention, asked for one block of scores at a time.

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

from performer_lm.ops.hashing import keep_mask
from performer_lm.ops.precision import high_low

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
            parts.append(~self.block(self.mask, rows, cols))
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
            scores.add_(self.block(self.bias, rows, cols), alpha=unit)
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

    def block(self, whole: Tensor | Block, rows: slice, cols: slice) -> Tensor:
        """Return one block of a mask or bias: `(b | 1, h | 1, rows | 1, cols | 1)`."""
        return slice_block(whole, rows, cols) if isinstance(whole, Tensor) else whole(rows, cols)


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
