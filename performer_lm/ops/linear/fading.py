"""Factors of decay and of document boundaries on the weights of keys, inside a tile.

A key's weight at query i is 2^(past_i - past_j) of what it was, where `past` sums log2 of the decay from the tile's
start on. Only differences count, and only between keys that one query sees. So a number per query may be left out, and
one per key may be a gain of that key: what is left as a matrix are powers of two of whole numbers, which are exact, or,
where little fades, nothing at all.

Letters: `x` batch times key heads, `t` tiles, `c` tokens of one (`i` queries, `j` keys).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.linear.state import Scratch
from performer_lm.ops.precision import LOG2_E

MILD = 24.0
"""By how many factors of 2 a tile may fade for all of its decay to be a gain of keys: float32 loses as many digits."""


class Fading(NamedTuple):
    """Factors from 0 to 1 on keys as a tile's queries, and the state at its end, see them; None stands for 1.

    Queries are left without a factor of 2^-gain, which their quotients do not feel.
    """

    between: Tensor  # (x, t, i, 1, j), or the triangle (i, 1, j): of key j at query i, 0 for later keys
    since_start: Tensor | None  # (x, t, i, 1, 1): of the state at query i
    until_end: Tensor | None  # (x, t, j, 1): of key j at the end
    gain: Tensor | None  # (x, t, c), float64: log2 of what keys are to be multiplied by beforehand
    total: Tensor | None  # (x, t, 1), float64, at most 0: log2 of what decay leaves of the state at the end
    ended: Tensor | None  # (x, t, 1) bool: whether a document ends, and nothing of the state is left
    is_mild: bool = False  # whether all decay is a gain of keys, which stand as they would at their tile's start

    def left(self, dtype: torch.dtype) -> Tensor | None:
        """Return the share of the state that is left at the end, `(x, t, 1)`."""
        left = None if self.total is None else self.total.exp2().to(dtype)
        if self.ended is None:
            return left
        return (~self.ended).to(dtype) if left is None else left.masked_fill_(self.ended, 0.0)


def fade(log_decay: Tensor | None, documents: Tensor | None, scratch: Scratch, c: int, *, gains: bool) -> Fading:
    """Compute the factors of tiles of c tokens.

    Args:
        log_decay: `(x, t, c)`, 0 where masked.
        documents: `(x, t, 1 + c)`: of the token before the tile, then of its own.
        scratch: holds triangles, and the dtype of the factors.
        c: tokens.
        gains: whether features are logarithms, which can have a gain; else decay is all in the factors.
    """
    triangle = scratch.triangle(c)
    if log_decay is None and documents is None:
        return Fading(triangle[:, None], None, None, None, None, None)
    between, since, until, gain, total, ended = triangle, None, None, None, None, None
    if log_decay is not None:
        past = sum_up_to(log_decay, scratch).mul_(LOG2_E)
        total = past[..., -1:]
        if gains and documents is None and total.device.type == "cpu" and float(total.amin()) > -MILD:
            return Fading(triangle[:, None], None, None, past.neg(), total, None, is_mild=True)
        whole = past.round() if gains else past
        gain = whole - past if gains else None
        between, since = _exp2_differences(whole, triangle.dtype), whole.to(triangle.dtype).exp2()
        until = (total - whole).exp2_().to(triangle.dtype)
    if documents is not None:
        first, own, last = documents[..., :1], documents[..., 1:], documents[..., -1:]
        between = between * (own[..., :, None] == own[..., None, :])
        since, until = (
            seen.to(triangle.dtype) if factor is None else factor * seen
            for factor, seen in ((since, own == first), (until, own == last))
        )
        ended = first != last
    assert since is not None
    assert until is not None
    return Fading(between[..., None, :], since[..., None, None], until[..., None], gain, total, ended)


def sum_up_to(x: Tensor, scratch: Scratch) -> Tensor:
    """Return the sums of `(..., c)` over 1..i, as precise as can be; a product, since scans have no fixed order."""
    triangle = scratch.triangle(x.shape[-1], of_logarithms=True)
    return x.to(triangle.dtype) @ triangle.mT


def _exp2_differences(past: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2^(past_i - past_j), 0 for later keys: `(x, t, c)` -> `(x, t, i, j)`."""
    past = past.to(dtype) if dtype != past.dtype else past
    return (past[..., :, None] - past[..., None, :]).exp2_().tril_()
