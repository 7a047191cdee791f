"""What is left of a key's weight with time: decay and document boundaries, as factors inside a chunk.

Letters: `x` batch times key heads, `t` chunks, `c` tokens of one (`i` queries, `j` keys).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.maps import LOG2_E, precise

class Fading(NamedTuple):
    """Factors from 0 to 1 on what a chunk's queries, and the state at its end, see of keys; None stands for 1."""

    between: Tensor  # (x, t, i, 1, j), or the triangle (i, 1, j): of key j at query i, 0 for later keys
    since_start: Tensor | None  # (x, t, i, 1, 1): of the state at query i
    until_end: Tensor | None  # (x, t, j, 1): of key j at the end
    total: Tensor | None  # (x, t, 1), float64, at most 0: log2 of what decay leaves of the state at the end
    ended: Tensor | None  # (x, t, 1) bool: whether a document ends, and nothing of the state is left

    @property
    def left(self) -> Tensor | None:
        """Return what is left of the state at the end, `(x, t, 1)`."""
        if self.ended is None:
            return None if self.total is None else self.total.exp2()
        stays = (~self.ended).to(precise(self.ended.device))
        return stays if self.total is None else stays * self.total.exp2()


def fade(log_decay: Tensor | None, documents: Tensor | None, triangle: Tensor) -> Fading:
    """Compute the factors of chunks.

    Args:
        log_decay: `(x, t, c)`, 0 where masked.
        documents: `(x, t, 1 + c)`: of the token before the chunk, then of its own.
        triangle: `(c, c)`, ones below the diagonal and on it: the factors of a chunk that does not fade.
    """
    between, since, until, total, ended = triangle, None, None, None, None
    if log_decay is not None:
        past = sum_up_to(log_decay) * LOG2_E
        between, since = _exp2_differences(past, between), past.exp2().to(between.dtype)
        total = past[..., -1:]
        until = (total - past).exp2_().to(between.dtype)
    if documents is not None:
        first, own, last = documents[..., :1], documents[..., 1:], documents[..., -1:]
        between = between * (own[..., :, None] == own[..., None, :])
        since, until = (
            seen.to(between.dtype) if factor is None else factor * seen
            for factor, seen in ((since, own == first), (until, own == last))
        )
        ended = first != last
    if since is None or until is None:
        return Fading(between[:, None], None, None, None, None)
    return Fading(between[..., None, :], since[..., None, None], until[..., None], total, ended)


def sum_up_to(x: Tensor) -> Tensor:
    """Return the sums of `(..., c)` over 1..i, as precise as can be; a product, since scans have no fixed order."""
    dtype = precise(x.device)
    return x.to(dtype) @ torch.ones(x.shape[-1], x.shape[-1], dtype=dtype, device=x.device).triu_()


def _exp2_differences(past: Tensor, triangle: Tensor) -> Tensor:
    """Return 2^(past_i - past_j), 0 for later keys: `(x, t, c)` -> `(x, t, i, j)`.

    Sums may be large where their differences are small, so they are taken apart into two numbers.
    """
    high = past.to(triangle.dtype)
    low = (past - high).to(triangle.dtype)
    lag = high[..., :, None] - high[..., None, :]
    return lag.add_(low[..., :, None]).sub_(low[..., None, :]).clamp_(max=0.0).exp2_().mul_(triangle)
