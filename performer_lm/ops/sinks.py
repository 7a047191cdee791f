"""The first tokens of a sequence, or of each document in it, which stay in a window's sight (StreamingLLM, 2309.17453).

Every query has its own, since documents differ; a masked key is as if absent, so sinks are the first kept keys.

Letters: `b` batch, `h` heads, `g` key heads, `r` query heads per key head, `i` queries, `j` keys, `s` sinks, `d` head
width, `e` value width.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from performer_lm.ops.checks import sum_of_newer


def meet_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    kept: Tensor,
    segments: Tensor | None,
    log_decay: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return each query's scores `(b, h, i, s)` with its sinks, -inf in or after the window, and their values.

    Masked tokens, if any, stand at the front of their row; q is scaled. Values are `(b, g, i, s, e)`.
    """
    queries, keys = q.shape[2], k.shape[2]
    places = torch.arange(keys, device=q.device)
    first = (places - _rank(kept, segments))[:, -queries:, None]
    wanted = first + torch.arange(sinks, device=q.device)
    too_new = places[-queries:, None] - wanted < window
    wanted = wanted.clamp(0, keys - 1)
    grouped = rearrange(q, "b (g r) i d -> b g r i d", g=k.shape[1])
    scores = einsum(grouped, _take_each(k, wanted), "b g r i d, b g i s d -> b g r i s")
    if log_decay is not None:
        newer = sum_of_newer(log_decay, kept)[..., None]
        faded = _take_each(newer, wanted)[..., 0] - newer[:, :, -queries:]
        scores = scores + faded[:, :, None].to(scores.dtype)
    scores = rearrange(scores, "b g r i s -> b (g r) i s").masked_fill(too_new[:, None], -torch.inf)
    return scores, _take_each(v, wanted)


def in_sight(kept: Tensor, segments: Tensor | None, window: int, sinks: int) -> Tensor:
    """Return True for the keys in the last query's window, and for sinks: `(b, j)`."""
    count = kept.cumsum(-1)
    return (count[:, -1:] - count < window) | (_rank(kept, segments) < sinks)


def _take_each(x: Tensor, wanted: Tensor) -> Tensor:
    """Take keys `wanted` `(b, i, s)` of `(b, g, j, d)` for each query: `(b, g, i, s, d)`.

    As rows of an embedding: many queries take one key, and these gradients are added in one order on every device.
    """
    batch, groups, keys, _ = x.shape
    rows = rearrange(x, "b g j d -> (b j) (g d)")
    starts = torch.arange(batch, device=x.device) * keys
    return rearrange(F.embedding(wanted + starts[:, None, None], rows), "b i s (g d) -> b g i s d", g=groups)


def _rank(kept: Tensor, segments: Tensor | None) -> Tensor:
    """Return the place of each kept key in its document, from 0, or in its sequence: `(b, j)`."""
    count = kept.cumsum(-1)
    if segments is None:
        return count - 1
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    before = torch.where(starts, count - kept.int(), 0).cummax(-1).values
    return count - 1 - before
