"""Bidirectional linear attention within documents: each token sees its own document, before it and after it.

What stands before a token is found as in causal attention, and what stands after it likewise from the other end; of
logarithms both in the exact form, since a loud document may lie beside a quiet one. The backward computes blocks anew.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `n` tokens, `d` head width, `e` value width,
`m` features. Inside, batch and key heads are one dimension `(g b)`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from performer_lm.ops.checks import check_per_key
from performer_lm.ops.linear.fading import Times
from performer_lm.ops.linear.halves import Block, Found, absorb, attend_halves, join, pull_halves
from performer_lm.ops.linear.packed import Packed
from performer_lm.ops.linear.state import LinearState, Rebased, add_gains, block_tokens, empty_state, rebase
from performer_lm.ops.linear.tokens import Maps
from performer_lm.ops.maps import LOG2_E, BlockMap
from performer_lm.ops.softmax import no_autocast


def bidirectional_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    *,
    query_map: BlockMap,
    key_map: BlockMap,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    log_gain: Tensor | None = None,
) -> Tensor:
    """Attend from each token to all of its own document, before and after it: `(b, h, n, e)` in q's dtype.

    Arguments are those of `causal_linear_attention`. Without documents, `absorb_keys` and `read_state` do the same for
    less.
    """
    mask = check_per_key(k, mask=mask, segments=segments, log_decay=None)
    if not k.shape[2]:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    b, g = k.shape[:2]
    dtype = torch.promote_types(k.dtype, torch.float32)
    maps = Maps(query=query_map.to(dtype), key=key_map.to(dtype))
    with no_autocast(q.device):
        packed = Packed(
            queries=rearrange(q, "b (g r) n d -> g b n r d", g=g).to(dtype),
            keys=k.transpose(0, 1).to(dtype),
            values=torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).transpose(0, 1).to(dtype),
            log_gain=None if log_gain is None else log_gain.transpose(0, 1),
            hidden=None if mask is None else ~mask,
            documents=torch.cat([segments[:, :1], segments], dim=-1),
        )
        form = LOGARITHMS if key_map.logarithmic else VALUES
        state = _empty(maps, packed)
        chunk_size, empty = (
            chunk_size or block_tokens(state, backward=torch.is_grad_enabled()),
            (state.sums.flatten(0, 1), state.exponent.flatten(0, 1)),
        )
        starts = list(range(0, k.shape[2], chunk_size))
        around = packed.reversed()
        stops = [min(start + chunk_size, k.shape[2]) for start in starts]
        before = _states(form, maps, packed, empty, starts)
        after = _states(form, maps, around, empty, [k.shape[2] - stop for stop in reversed(stops)])[::-1]
        outputs = []
        for start, stop, left, right in zip(starts, stops, before, after, strict=True):
            given = maps, packed.part(start, stop), around.part(k.shape[2] - stop, k.shape[2] - start), left, right
            outputs.append(checkpoint(form.see, *given, use_reentrant=False, preserve_rng_state=False))
    return rearrange(torch.cat(outputs, dim=1), "(g b) n r e -> b (g r) n e", b=b).to(q.dtype)


State = tuple[Tensor, Tensor]  # sums ((g b), m, e + 1) and exponents ((g b), m)


class Form(NamedTuple):
    """What is done with a block of tokens."""

    absorb: Callable[[Maps, Packed, Tensor, Tensor], State]
    """Return the state after it: the sums over the last token's document."""
    see: Callable[[Maps, Packed, Packed, State, State], Tensor]
    """Return what its queries see, `((g b), n, r, e)`; given the block, the same from its end, and both states."""


def _empty(maps: Maps, packed: Packed) -> LinearState:
    g, b, _, _ = packed.keys.shape
    values, logs = maps.key(packed.keys[:, 0, :1])
    features = logs if values is None else values
    assert features is not None
    width = packed.values.shape[-1] - 1
    return empty_state(b, g, features.shape[-1], width, device=features.device, dtype=features.dtype)


def _states(form: Form, maps: Maps, packed: Packed, state: State, starts: list[int]) -> list[State]:
    """Return the state before each block."""
    states = [state]
    for start, stop in pairwise(starts):
        part = packed.part(start, stop)
        states.append(checkpoint(form.absorb, maps, part, *states[-1], use_reentrant=False, preserve_rng_state=False))
    return states


def _normalised(seen: Tensor) -> Tensor:
    mass = seen[..., -1:]
    return seen[..., :-1] / mass.masked_fill(mass == 0, 1.0)


# --- features that are logarithms -------------------------------------------------------------------------------------


def _open(maps: Maps, packed: Packed, exponent: Tensor) -> tuple[Block, Rebased]:
    """Map a block of tokens to log features, relative to an origin near them."""
    (g, b, n, _), r = packed.keys.shape, packed.queries.shape[3]
    flat = packed.keys.flatten(1, 2)
    queries, keys = maps.query(packed.queries.flatten(1, 3)).log_scale, maps.key(flat).log_scale
    assert queries is not None
    assert keys is not None
    gain = add_gains(maps.key.gain(flat), None if packed.log_gain is None else packed.log_gain.flatten(1, 2))
    base = rebase(None if gain is None else gain.reshape(g * b, n), exponent)
    keys = LOG2_E * keys.reshape(g * b, n, -1)
    keys = keys if base.shift is None else keys + base.shift.to(keys.dtype)
    values = packed.values.flatten(0, 1)
    if packed.hidden is not None:
        hidden = packed.hidden.repeat(g, 1)[..., None]
        keys, values = keys.masked_fill(hidden, -torch.inf), values.masked_fill(hidden, 0.0)
    times = Times(None, packed.documents.repeat(g, 1))
    return Block(LOG2_E * queries.reshape(g * b, n, r, -1), keys, values, times), base


def _absorb(maps: Maps, packed: Packed, sums: Tensor, exponent: Tensor) -> State:
    block, base = _open(maps, packed, exponent)
    sums, scale = absorb(block, sums, base.before)
    return sums, base.absolute(scale)


def _see(maps: Maps, packed: Packed, around: Packed, before: State, after: State) -> Tensor:
    """Return what a block's queries see on both sides: `((g b), n, r, e)`."""
    found = []
    for part, (sums, exponent), own in ((packed, before, True), (around, after, False)):
        block, base = _open(maps, part, exponent)
        seen, peak = _Look.apply(own, base.before, block.times.documents, *block[:3], sums)
        if base.origin is not None:
            peak = peak + base.origin[..., None]
        found.append(Found(peak, seen))
    return _normalised(join(found[0], Found(*(x.flip(1) for x in found[1]))))


class _Look(torch.autograd.Function):
    """`attend_halves`, with the gradient that `pull_halves` gives."""

    @staticmethod
    def forward(
        ctx: Any,
        own: bool,
        before: Tensor,
        documents: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sums: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return what is seen and its peak, which carries no gradient."""
        ctx.own = own
        ctx.save_for_backward(before, documents, queries, keys, values, sums)
        peak, seen = attend_halves(Block(queries, keys, values, Times(None, documents)), sums, before, own=own)
        ctx.mark_non_differentiable(peak)
        return seen, peak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Pull back through one block."""
        before, documents, queries, keys, values, sums = ctx.saved_tensors
        block = Block(queries, keys, values, Times(None, documents))
        found = pull_halves(block, sums, before, grad, own=ctx.own)
        queries, keys = (x / LOG2_E for x in found[:2])  # they arrived in units of log 2
        return None, None, None, queries, keys, found.values, found.sums


LOGARITHMS = Form(_absorb, _see)


# --- features as they are ---------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """A block of tokens as features."""

    queries: Tensor  # ((g b), n, r, m)
    keys: Tensor  # ((g b), n, m), 0 where hidden
    values: Tensor  # ((g b), n, e + 1), likewise
    beside: Tensor  # ((g b), 1): the document of the token before
    documents: Tensor  # ((g b), n)


def _weights(maps: Maps, packed: Packed) -> Weights:
    (g, b, n, _), r = packed.keys.shape, packed.queries.shape[3]
    queries, keys = maps.query(packed.queries.flatten(1, 3)).values, maps.key(packed.keys.flatten(1, 2)).values
    assert queries is not None
    assert keys is not None
    keys, values = keys.reshape(g * b, n, -1), packed.values.flatten(0, 1)
    if packed.hidden is not None:
        keys, values = (x.masked_fill(packed.hidden.repeat(g, 1)[..., None], 0.0) for x in (keys, values))
    documents = packed.documents.repeat(g, 1)
    return Weights(queries.reshape(g * b, n, r, -1), keys, values, documents[:, :1], documents[:, 1:])


def _absorb_values(maps: Maps, packed: Packed, sums: Tensor, exponent: Tensor) -> State:
    block = _weights(maps, packed)
    last = block.documents[:, -1:]
    stays = (block.documents == last)[..., None].to(sums.dtype)
    return sums * (block.beside == last)[..., None] + (stays * block.keys).mT @ block.values, exponent


def _see_values(maps: Maps, packed: Packed, around: Packed, before: State, after: State) -> Tensor:
    block, own = _weights(maps, packed), packed.documents.repeat(len(packed.keys), 1)[:, 1:]
    next_one = around.documents.repeat(len(around.keys), 1)[:, :1]
    scores = torch.einsum("birm,bjm->birj", block.queries, block.keys)
    seen = (scores * (own[:, :, None] == own[:, None, :])[:, :, None]) @ block.values[:, None]
    for (sums, _), beside in ((before, block.beside), (after, next_one)):
        seen = seen + (block.queries @ sums[:, None]) * (own == beside)[..., None, None]
    return _normalised(seen)


VALUES = Form(_absorb_values, _see_values)
