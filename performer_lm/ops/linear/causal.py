"""Causal linear attention over a sequence: a loop over blocks, and a backward that computes features anew.

Forward keeps q, k, v, the output and one state per block; backward walks the blocks from the end. So nothing of size
n x m outlives its block, let alone n x m x e.

Letters: `b` batch times key heads, `r` queries per key, `n` tokens, `t` tiles of `c` tokens, `d` head width, `e` value
width, `m` features.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from performer_lm.ops.linear.block import TILE, Maps, Pulled, State, Step, Tokens, pull_step, take_step, take_token
from performer_lm.ops.linear.fading import Times


class Inputs(NamedTuple):
    """A whole sequence."""

    queries: Tensor  # (b, r, n, d)
    keys: Tensor  # (b, n, d)
    values: Tensor  # (b, n, e)
    log_gain: Tensor | None  # (b, n): added to all log features of a key
    mask: Tensor | None  # (b, n): False keys are absent
    log_decay: Tensor | None  # (b, n): 0 where masked
    documents: Tensor | None  # (b, 1 + n): the state's document first


class Trace(NamedTuple):
    """What a forward leaves for its backward."""

    out: Tensor  # (b, r, n, e), before it is rounded to the inputs' dtype
    mass: Tensor  # (b, r, n, 1): its denominators, each on its own scale
    states: list[State]  # before each block, and after the last
    dense: list[bool]


def cut(n: int, chunk_size: int) -> Iterator[slice]:
    """Cut n tokens into blocks of `chunk_size`; what is left over into whole tiles and a last part of one."""
    start = 0
    while start < n:
        size = min(chunk_size, n - start)
        size = size - size % TILE if size > TILE else size
        yield slice(start, start + size)
        start += size


def run_token(maps: Maps, inputs: Inputs, state: State, *, own: bool) -> tuple[Tensor, State]:
    """Attend to a sequence of one token: `(b, r, 1, e)`. A state that is its `own` is written into."""
    step = take_token(maps, _take(inputs, slice(0, 1), state.sums.dtype), state, own=own)
    mass = step.seen[..., -1:]
    out = step.seen[..., :-1] / mass.masked_fill_(mass == 0, 1.0)
    return out[:, :, None].to(inputs.queries.dtype), step.state


def run(maps: Maps, chunk_size: int, inputs: Inputs, state: State, *, keep: bool) -> Trace:
    """Attend to a sequence, keeping all the states on the way, or the last only."""
    b, r, n, _ = inputs.queries.shape
    e = inputs.values.shape[-1]
    out, mass = state.sums.new_empty(b, r, n, e), state.sums.new_empty(b, r, n, 1)
    triangle = _triangle(state.sums, n)
    states, dense = [state], []
    for part in cut(n, chunk_size):
        tokens = _take(inputs, part, state.sums.dtype)
        step = take_step(maps, tokens, states[-1], triangle)
        seen = rearrange(step.seen, "(b t) (r c) e -> b r t c e", b=b, r=r)
        found = seen[..., e:]
        found.masked_fill_(found == 0, 1.0)
        torch.div(seen[..., :e], found, out=_tiled(out[:, :, part], tokens.tiles))
        _tiled(mass[:, :, part], tokens.tiles).copy_(found)
        states = [*states, step.state] if keep else [step.state]
        dense.append(step.dense)
    return Trace(out, mass, states, dense)


class CausalAttention(torch.autograd.Function):
    """Attend to a sequence block by block, keeping no features.

    `apply(maps, chunk_size, *inputs, *state, *maps.tensors)` returns the output `(b, r, n, e)`, the next sums and their
    log scale, which carries no gradient.
    """

    @staticmethod
    def forward(ctx: Any, maps: Maps, chunk_size: int, *leaves: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Attend, and keep the state before each block."""
        inputs, state = Inputs(*leaves[:7]), State(*leaves[7:9])
        maps = maps.with_tensors(leaves[9:])
        trace = run(maps, chunk_size, inputs, state, keep=True)
        ctx.maps, ctx.chunk_size, ctx.dense = maps, chunk_size, trace.dense
        scales = [state.log_scale for state in trace.states]
        ctx.save_for_backward(*leaves, trace.out, trace.mass, *(state.sums for state in trace.states[:-1]), *scales)
        ctx.mark_non_differentiable(scales[-1])
        return trace.out.to(inputs.queries.dtype), trace.states[-1].sums, scales[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_sums: Tensor, _: Tensor) -> tuple[Any, ...]:
        """Walk the blocks from the end."""
        count, blocks = len(ctx.needs_input_grad) - 2, len(ctx.dense)
        saved = ctx.saved_tensors  # asked for once, as checkpointing wants it
        leaves, (out, mass, *kept) = saved[:count], saved[count:]
        inputs, tensors = Inputs(*leaves[:7]), leaves[9:]
        maps, wanted = ctx.maps.with_tensors(tensors), any(ctx.needs_input_grad[-len(tensors) :])
        found = _room_for_gradients(inputs)
        totals: list[Tensor | None] = [None] * len(tensors)
        triangle = _triangle(out, out.shape[2])
        parts = list(cut(out.shape[2], ctx.chunk_size))
        for a in reversed(range(blocks)):
            part, tokens = parts[a], _take(inputs, parts[a], out.dtype)
            grad_seen = _pull_division(grad[:, :, part], out[:, :, part], mass[:, :, part], tokens.tiles)
            after = State(grad_sums, kept[blocks + a + 1])
            pulled = pull_step(
                maps,
                tokens,
                State(kept[a], kept[blocks + a]),
                Step(grad_seen, after, ctx.dense[a]),
                grad_sums,
                triangle,
                wanted=wanted,
            )
            grad_sums = pulled.sums
            _put(found, part, pulled, tokens.tiles)
            totals = [_plus(total, more) for total, more in zip(totals, pulled.tensors, strict=True)]
        return None, None, *found, grad_sums, None, *totals


def _room_for_gradients(inputs: Inputs) -> Inputs:
    log_gain, log_decay = (None if x is None else torch.empty_like(x) for x in (inputs.log_gain, inputs.log_decay))
    queries, keys, values = (torch.empty_like(x) for x in inputs[:3])
    return Inputs(queries, keys, values, log_gain, None, log_decay, None)


def _triangle(like: Tensor, tokens: int) -> Tensor:
    size = min(TILE, tokens)
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril_()


def _tiled(x: Tensor, tiles: int) -> Tensor:
    """View `(b, r, n, e)` as `(b, r, t, c, e)`."""
    return x.unflatten(2, (tiles, -1))


def _take(inputs: Inputs, part: slice, dtype: torch.dtype) -> Tokens:
    """Cut out one block, in the dtype of the sums, with nothing left in masked tokens."""
    mask, log_decay = (None if x is None else x[:, part] for x in (inputs.mask, inputs.log_decay))
    keys, values = inputs.keys[:, part].to(dtype), inputs.values[:, part].to(dtype)
    if mask is not None:
        keys, values = (x.masked_fill(~mask[..., None], 0.0) for x in (keys, values))
    tiles = max(1, keys.shape[1] // TILE)
    documents = None if inputs.documents is None else inputs.documents[:, part.start : part.stop + 1]
    return Tokens(
        queries=_tiled(inputs.queries[:, :, part], tiles).transpose(1, 2).flatten(1, 3).to(dtype),
        keys=keys,
        values=torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1),
        log_gain=None if inputs.log_gain is None else inputs.log_gain[:, part],
        mask=mask,
        times=Times(None if log_decay is None else log_decay.to(dtype), documents),
        tiles=tiles,
    )


def _put(whole: Inputs, part: slice, pulled: Pulled, tiles: int) -> None:
    """Write one block's gradients to their places in those of the sequence."""
    r = whole.queries.shape[1]
    _tiled(whole.queries[:, :, part], tiles).copy_(rearrange(pulled.queries, "b (t r c) d -> b r t c d", t=tiles, r=r))
    whole.keys[:, part] = pulled.keys
    whole.values[:, part] = pulled.values[..., :-1]
    for x, piece in ((whole.log_gain, pulled.log_gain), (whole.log_decay, pulled.log_decay)):
        if x is not None and piece is not None:
            x[:, part] = piece


def _pull_division(grad: Tensor, out: Tensor, mass: Tensor, tiles: int) -> Tensor:
    """Return the gradient at numerators and denominators, `(b t, r c, e + 1)`, given that at their quotient `out`."""
    seen = grad.new_empty(*out.shape[:-1], out.shape[-1] + 1, dtype=out.dtype)
    numerator = torch.div(grad, mass, out=seen[..., :-1])
    seen[..., -1] = -(numerator * out).sum(dim=-1)
    return rearrange(_tiled(seen, tiles), "b r t c e -> (b t) (r c) e")


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None or more is None else total.add_(more)
