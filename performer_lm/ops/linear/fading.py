"""What is left of a key's weight with time: decay and document boundaries, as factors inside one tile.

Letters: `b` batch times key heads, `t` tiles, `c` tokens of one (`i` queries, `j` keys).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.maps import LOG2_E, precise


class Times(NamedTuple):
    """What the tokens of a block fade by."""

    log_decay: Tensor | None = None  # (b, n), 0 where masked
    documents: Tensor | None = None  # (b, 1 + n): the state's document, then the tokens'

    @property
    def fade(self) -> bool:
        """Tell whether anything fades at all."""
        return self.log_decay is not None or self.documents is not None

    def tiles(self, count: int) -> "Times":
        """Cut into tiles of equal size, as a batch `(b count, c)`."""
        log_decay, documents = self
        if log_decay is not None:
            log_decay = log_decay.unflatten(1, (count, -1)).flatten(0, 1)
        if documents is not None:
            c = (documents.shape[1] - 1) // count
            documents = documents.unfold(1, c + 1, c).flatten(0, 1)
        return Times(log_decay, documents)


class Fading(NamedTuple):
    """Factors from 0 to 1 on what a tile's queries, and the state at its end, see of keys."""

    between: Tensor  # (b, t, i, 1, j), or the triangle (i, 1, j): of key j at query i, 0 for later keys
    since_start: Tensor | None  # (b, t, i, 1, 1): of the state at query i; None stands for 1, here and below
    until_end: Tensor | None  # (b, t, j, 1): of key j at the end
    across: Tensor | None  # (b, t, 1, 1): of the state at the end


def sum_later(log_decay: Tensor) -> Tensor:
    """Return the sums of `(..., c)` over j+1..c, added up from the end, so that the last ones are the most exact."""
    later = torch.cat([log_decay[..., 1:], torch.zeros_like(log_decay[..., :1])], dim=-1)
    return later.flip(-1).cumsum(dim=-1).flip(-1)


def fading(times: Times, count: int, triangle: Tensor) -> Fading:
    """Return the factors of a block of `count` tiles; `triangle` is the `(c, c)` of one that does not fade."""
    if not times.fade:
        return Fading(triangle[:, None], None, None, None)
    log_decay, documents = times.tiles(count)
    found: list[Tensor | None] = [None] * 4
    if log_decay is not None:
        total = log_decay.cumsum(dim=-1, dtype=precise(log_decay.device))
        since = total.exp().to(triangle.dtype)
        found = [_exp_differences(total, triangle.dtype), since, sum_later(log_decay).exp(), since[:, -1]]
    if documents is not None:
        first, own, last = documents[:, :1], documents[:, 1:], documents[:, -1:]
        kept = (own[:, :, None] == own[:, None, :], own == first, own == last, (first == last)[:, 0])
        found = [x.to(triangle.dtype) if old is None else old * x for x, old in zip(kept, found, strict=True)]
    between, since_start, until_end, across = (x.unflatten(0, (-1, count)) for x in found if x is not None)
    return Fading(
        between.tril_()[..., None, :], since_start[..., None, None], until_end[..., None], across[..., None, None]
    )


def _exp_differences(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Return exp(total_i - total_j), 1 where that is more: `(b, c)` -> `(b, i, j)`.

    Sums may be large where their differences are small, so they are taken apart into two numbers of `dtype`.
    """
    total = total * LOG2_E
    high = total.to(dtype)
    low = (total - high).to(dtype)
    lag = high[:, :, None] - high[:, None, :]
    return lag.add_(low[:, :, None]).sub_(low[:, None, :]).clamp_(max=0.0).exp2_()


def pull_decay(totals: Tensor, before: Tensor) -> Tensor:
    """Return the gradient at log_decay `(b, n)`.

    To fade at token j is to weaken all keys before it: for a query before j, all that it sees, which cancels.

    Args:
        totals: `(b, n)`, the gradients at the logarithms of the keys' weights.
        before: `(b,)`, that at the logarithm of the state's.
    """
    earlier = totals.to(precise(totals.device)).cumsum(dim=-1) - totals
    return (earlier + before[:, None]).to(totals.dtype)
