"""How chunked attention is cut into blocks, and how the scores of one block are computed.

Scores are in units of log 2, since exp2 is faster than exp and, unlike it, no slower where it underflows.

Letters: `b` batch, `h` heads, `g` key heads, `r` query heads per key head, `j` keys, `d` head width, `c` and `s` query
and key chunk, `x` = b g, `y` = r c.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.ops.precision import LOG2_E
from performer_lm.ops.terms import Terms, slices

BLOCK_SCORES = 2**19  # of all heads together: the largest block that caches still hold
KEY_MULTIPLE = 256
FEWEST_QUERIES = 64  # below it the matrix products slow down more than the cache helps


@dataclass(frozen=True)
class Chunks:
    """How one call is cut, and how a block of it is computed."""

    terms: Terms
    rows: int
    cols: int

    def query_chunks(self) -> Iterator[slice]:
        return slices(self.terms.queries, self.rows)

    def key_chunks(self, rows: slice) -> Iterator[slice]:
        """Yield the key chunks that some query of `rows` can see."""
        return (cols for cols in slices(self.terms.keys, self.cols) if not self.terms.is_empty(rows, cols))

    def memory(self, keys: Tensor) -> Tensor:
        """Return flat memory for the largest block of scores over keys `(x j d)`."""
        per_key_head = self.terms.heads * self.rows * self.cols // self.terms.groups
        return keys.new_empty(keys.shape[0] * per_key_head)

    def scores(self, query: Tensor, key: Tensor, rows: slice, cols: slice, memory: Tensor) -> Tensor:
        """Compute the scores of one block, `(x, y, d), (x, s, d) -> (x, y, s)`, in `memory`."""
        scores = torch.bmm(query, key.mT, out=front(memory, query, key))
        self.terms.add_to(self.per_head(scores), rows, cols, unit=LOG2_E)
        return scores

    def drop(self, weights: Tensor, rows: slice, cols: slice) -> Tensor:
        """Drop weights (or their gradients) `(x, y, s)` in place."""
        if self.terms.dropout > 0.0:
            block = self.per_head(weights)
            block.mul_(self.terms.kept(block, rows, cols))
        return weights

    def per_head(self, block: Tensor) -> Tensor:
        """View a block `(x, y, s)` as `(b, h, c, s)`."""
        groups = self.terms.groups
        return rearrange(block, "(b g) (r c) s -> b (g r) c s", g=groups, r=self.terms.heads // groups)


def cut(batch: int, terms: Terms, rows: int | None, cols: int | None) -> Chunks:
    """Fill in the chunk sizes: about 4 sqrt(j) keys, and queries to make `BLOCK_SCORES` with them over all heads."""
    for name, size in (("query_chunk_size", rows), ("key_chunk_size", cols)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if cols is None:
        cols = -(-4 * isqrt(terms.keys) // KEY_MULTIPLE) * KEY_MULTIPLE
    cols = max(min(cols, terms.keys), 1)
    if rows is None:
        most = cols if terms.causal else 2 * cols  # of a tall block, more lies in the future
        rows = min(max(BLOCK_SCORES // (max(batch * terms.heads, 1) * cols), FEWEST_QUERIES), most)
    return Chunks(terms, max(min(rows, terms.queries), 1), cols)


def front(memory: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """View the front of flat `memory` as a block `(x, y, s)`."""
    shape = (query.shape[0], query.shape[1], key.shape[1])
    return memory[: shape[0] * shape[1] * shape[2]].view(shape)
