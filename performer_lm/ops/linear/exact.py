"""A block of causal linear attention at any loudness: chunks whose own weights are summed pair by pair, in logarithms.

Every weight a query finds, in its chunk by the definition (`naive.py`) and in the past through the state, is put
relative to the largest of them, so what vanishes beside it is nothing. Chunks are short, since this costs c x c x m
exponentials each; `chunks.py` does the rest, and all of a block whose features lie near each other.

Letters: as in `chunks.py`.
"""

import torch
from torch import Tensor

from performer_lm.ops.linear.chunks import Chunks, loudest_before, steps_between, write_keys, write_queries
from performer_lm.ops.linear.fading import Fading, sum_up_to
from performer_lm.ops.linear.naive import log_weights
from performer_lm.ops.linear.state import EMPTY, LinearState, Scratch
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.maps import Maps
from performer_lm.ops.precision import LOG2_E

EXACT_TILE = 16


def open_exact(maps: Maps, tokens: Tokens, state: LinearState, scratch: Scratch) -> Chunks:
    """Compute the matrices of a block of logarithmic features at any loudness; each tile has a scale of its own."""
    rows, origin = write_keys(maps, tokens, state, scratch, gain=None)
    assert origin is not None, "features that are no logarithms always fit"
    queries = write_queries(maps, tokens, None, scratch, rows.shape[-1])
    fading, past, visible = _fade(tokens, scratch)
    until = past[..., -1:] - past
    if tokens.documents is not None:
        until = until.masked_fill(tokens.documents[..., 1:] != tokens.documents[..., -1:], -torch.inf)
    ends = rows + until[..., None].to(rows.dtype)
    ending = (ends.amax(dim=2) + origin).clamp_(min=EMPTY)
    before = loudest_before(state, ending, fading, scratch)
    stays = before if fading.total is None else before + fading.total
    stays = stays if fading.ended is None else stays.masked_fill(fading.ended, EMPTY)
    after = torch.cat([before[:, 1:], torch.maximum(stays, ending)[:, -1:]], dim=1)
    steps = steps_between(state.exponent, before, ending, after, fading, rows)

    r = queries.shape[2] // rows.shape[2]
    from_past = queries + ((before - origin)[:, :, None] + past[..., None]).repeat_interleave(r, dim=2)
    if tokens.documents is not None:
        others = tokens.documents[..., 1:] != tokens.documents[..., :1]
        from_past.masked_fill_(others.repeat_interleave(r, dim=2)[..., None], -torch.inf)
    keys = rows if tokens.mask is None else rows.masked_fill(~tokens.mask[..., None], 0.0)
    lag = (past[..., :, None] - past[..., None, :]).to(rows.dtype) / LOG2_E

    loudness = keys.amax(dim=-1, keepdim=True)  # added last, as float32 is finest near zero
    asked = (queries / LOG2_E).unflatten(2, (keys.shape[2], r)).transpose(2, 3)
    given = ((keys - loudness) / LOG2_E)[:, :, None]

    def pull_own(grad: Tensor) -> tuple[Tensor, Tensor]:
        shares = (asked[..., :, None, :] + given[..., None, :, :]).softmax(dim=-1)  # of the features in each weight
        shares *= grad.unflatten(2, (keys.shape[2], r)).transpose(2, 3)[..., None]
        return shares.sum(dim=-2).transpose(2, 3).flatten(2, 3), shares.sum(dim=(2, 3))

    logs = log_weights(asked, given, visible=visible[:, :, None], fading=lag[:, :, None]).transpose(2, 3).flatten(2, 3)
    logs = LOG2_E * logs.to(origin.dtype) + loudness.mT
    peak = torch.maximum(from_past.amax(dim=-1, keepdim=True), logs.amax(dim=-1, keepdim=True)).clamp_(min=EMPTY)
    queries.copy_((from_past - peak).exp2_())
    rows.copy_((ends - (ending - origin)[:, :, None]).exp2_())
    scores = (logs - peak).exp2_().to(rows.dtype)
    return Chunks(queries, rows, scores, fading, steps, peak + origin[..., None], pull_own)


def _fade(tokens: Tokens, scratch: Scratch) -> tuple[Fading, Tensor, Tensor]:
    """Return what `steps_between` needs, log2 of what is left of the past at each token `(x, t, c)` by decay, and which
    keys it sees `(x, t, i, j)`.
    """
    x, t, c, _ = tokens.keys.shape
    visible = torch.ones(c, c, dtype=torch.bool, device=tokens.keys.device).tril_().expand(x, t, c, c)
    log_decay = tokens.keys.new_zeros(x, t, c) if tokens.log_decay is None else tokens.log_decay
    past, ended = LOG2_E * sum_up_to(log_decay, scratch), None
    if tokens.mask is not None:
        visible = visible & tokens.mask[..., None, :]
    if tokens.documents is not None:
        first, own, last = tokens.documents[..., :1], tokens.documents[..., 1:], tokens.documents[..., -1:]
        visible = visible & (own[..., :, None] == own[..., None, :])
        ended = first != last
    return Fading(visible, None, None, None, past[..., -1:], ended), past, visible
