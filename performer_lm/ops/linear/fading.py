"""What is left of a key's weight with time: decay and document boundaries, as factors inside one block.

Letters: `b` batch times key heads, `c` tokens of the block (`i` queries, `j` keys).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Fading(NamedTuple):
    """Factors from 0 to 1 on what a block's queries and its end see of keys; None stands for 1."""

    between: Tensor  # (b or 1, i, j): of key j at query i, 0 for later keys
    since_start: Tensor | None  # (b, i): of the state at query i
    until_end: Tensor | None  # (b, j): of key j at the end
    across: Tensor | None  # (b,): of the state at the end


class Times(NamedTuple):
    """What a block's fading is made from."""

    log_decay: Tensor | None  # (b, c), 0 where masked
    documents: Tensor | None  # (b, 1 + c): the state's document, then the tokens'

    def tiles(self, count: int) -> "Times":
        """Cut into tiles of equal size, as a batch `(b count, c)`."""
        log_decay, documents = self
        if log_decay is not None:
            log_decay = log_decay.unflatten(1, (count, -1)).flatten(0, 1)
        if documents is not None:
            c = (documents.shape[1] - 1) // count
            documents = documents.unfold(1, c + 1, c).flatten(0, 1)
        return Times(log_decay, documents)

    @property
    def fade(self) -> bool:
        """Tell whether anything fades at all."""
        return self.log_decay is not None or self.documents is not None


def sum_later(log_decay: Tensor) -> Tensor:
    """Return the sums of `(..., c)` over j+1..c, added up from the end, so that the last ones are the most exact."""
    later = torch.cat([log_decay[..., 1:], torch.zeros_like(log_decay[..., :1])], dim=-1)
    return later.flip(-1).cumsum(dim=-1).flip(-1)


def fading(times: Times, causal: Tensor) -> Fading:
    """Return the factors of times `(b, c)`, given a lower triangle of ones with at least c rows."""
    if not times.fade:
        return Fading(causal[None], None, None, None)
    between, since, until, across = causal[None], None, None, None
    if times.log_decay is not None:
        total = times.log_decay.cumsum(dim=-1, dtype=torch.float64)
        between = _exp_differences(total, causal.dtype).mul_(causal)
        since, until = total.exp().to(causal.dtype), sum_later(times.log_decay).exp()
        across = since[:, -1]
    if times.documents is not None:
        first, own, last = times.documents[:, :1], times.documents[:, 1:], times.documents[:, -1:]
        between = between * (own[:, :, None] == own[:, None, :])
        since = _where(own == first, since)
        until = _where(own == last, until)
        across = _where((first == last)[:, 0], across)
    return Fading(between, since, until, across)


def _exp_differences(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Return exp(total_i - total_j), 1 where that is more: `(b, c)` -> `(b, i, j)`.

    Sums may be large where their differences are small, so they are taken apart into two numbers of `dtype`.
    """
    high = total.to(dtype)
    low = (total - high).to(dtype)
    lag = high[:, :, None] - high[:, None, :]
    return lag.add_(low[:, :, None]).sub_(low[:, None, :]).clamp_(max=0.0).exp_()


def _where(kept: Tensor, factor: Tensor | None) -> Tensor:
    return kept.to(torch.get_default_dtype()) if factor is None else factor * kept


def pull_fading(between: Tensor, since_start: Tensor, until_end: Tensor, across: Tensor) -> Tensor:
    """Return the gradient at log_decay `(b, c)`, given those at the logarithms of the four factors."""
    total = between.sum(dim=2) - between.sum(dim=1) + since_start - until_end
    total[:, -1] += across + until_end.sum(dim=1)
    return total.flip(-1).cumsum(dim=-1).flip(-1)
