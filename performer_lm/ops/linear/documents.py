"""Bidirectional linear attention within documents: each token sees its own document, before it and after it.

What stands before a token is found as in causal attention, and what stands after it likewise from the other end; both
in the exact form, since a loud document may lie beside a quiet one. The backward computes blocks anew.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `n` tokens, `d` head width, `e` value width,
`m` features. Inside, batch and key heads are one dimension `(g b)`.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from performer_lm.ops.linear.fading import Times
from performer_lm.ops.linear.halves import Block, Found, absorb, attend_halves, join, pull_halves
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

    Raises:
        ValueError: for maps that are not logarithmic.
    """
    if not key_map.logarithmic:
        raise ValueError("bidirectional segments need exponential features; attn=flash_tiled takes segments too")
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
        state = _empty(maps, packed)
        chunk_size, empty = chunk_size or block_tokens(state), (state.sums.flatten(0, 1), state.exponent.flatten(0, 1))
        starts = list(range(0, k.shape[2], chunk_size))
        around = packed.reversed()
        stops = [min(start + chunk_size, k.shape[2]) for start in starts]
        before = _states(maps, packed, empty, starts)
        after = _states(maps, around, empty, [k.shape[2] - stop for stop in reversed(stops)])[::-1]
        outputs = []
        for start, stop, left, right in zip(starts, stops, before, after, strict=True):
            parts = packed.part(start, stop), around.part(k.shape[2] - stop, k.shape[2] - start)
            outputs.append(checkpoint(_see, maps, *parts, left, right, use_reentrant=False, preserve_rng_state=False))
    return rearrange(torch.cat(outputs, dim=1), "(g b) n r e -> b (g r) n e", b=b).to(q.dtype)


class Packed(NamedTuple):
    """Documents in a row, in the dtype of the sums."""

    queries: Tensor  # (g, b, n, r, d)
    keys: Tensor  # (g, b, n, d)
    values: Tensor  # (g, b, n, e + 1): [v, 1]
    log_gain: Tensor | None  # (g, b, n)
    hidden: Tensor | None  # (b, n): True keys are absent
    documents: Tensor  # (b, 1 + n): the first token's document stands twice

    def part(self, start: int, stop: int) -> "Packed":
        """Cut out some tokens."""
        return Packed(
            queries=self.queries[:, :, start:stop],
            keys=self.keys[:, :, start:stop],
            values=self.values[:, :, start:stop],
            log_gain=None if self.log_gain is None else self.log_gain[:, :, start:stop],
            hidden=None if self.hidden is None else self.hidden[:, start:stop],
            documents=self.documents[:, start : stop + 1],
        )

    def reversed(self) -> "Packed":
        """Turn the row of tokens round."""
        documents = self.documents[:, 1:].flip(1)
        return Packed(
            queries=self.queries.flip(2),
            keys=self.keys.flip(2),
            values=self.values.flip(2),
            log_gain=None if self.log_gain is None else self.log_gain.flip(2),
            hidden=None if self.hidden is None else self.hidden.flip(1),
            documents=torch.cat([documents[:, :1], documents], dim=1),
        )


State = tuple[Tensor, Tensor]  # sums ((g b), m, e + 1) and exponents ((g b), m)


def _empty(maps: Maps, packed: Packed) -> LinearState:
    g, b, _, _ = packed.keys.shape
    logs = maps.key(packed.keys[:, 0, :1]).log_scale
    assert logs is not None
    width = packed.values.shape[-1] - 1
    return empty_state(b, g, logs.shape[-1], width, device=logs.device, dtype=logs.dtype)


def _states(maps: Maps, packed: Packed, state: State, starts: list[int]) -> list[State]:
    """Return the state before each block."""
    states = [state]
    for start, stop in pairwise(starts):
        part = packed.part(start, stop)
        states.append(checkpoint(_absorb, maps, part, *states[-1], use_reentrant=False, preserve_rng_state=False))
    return states


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
    seen = join(found[0], Found(*(x.flip(1) for x in found[1])))
    mass = seen[..., -1:]
    return seen[..., :-1] / mass.masked_fill(mass == 0, 1.0)


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
