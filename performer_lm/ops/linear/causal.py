"""Causal linear attention as its callers see it: q, k, v and a state in, the output and the next state out.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `d` head width, `e` value width, `m` features.
"""

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from performer_lm.ops.checks import check_batch, check_per_key
from performer_lm.ops.linear.compiled import attend_compiled
from performer_lm.ops.linear.sequence import Inputs, Trace, attend, pull
from performer_lm.ops.linear.state import LinearState, block_tokens
from performer_lm.ops.linear.step import attend_token
from performer_lm.ops.linear.tokens import Maps, State
from performer_lm.ops.maps import BlockMap
from performer_lm.ops.softmax import no_autocast


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState,
    *,
    query_map: BlockMap,
    key_map: BlockMap,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    log_decay: Tensor | None = None,
    log_gain: Tensor | None = None,
    consume: bool = False,
) -> tuple[Tensor, LinearState]:
    """Append n tokens to `state`, each attending to all before it and itself: the output and the next state.

    Any split of a sequence over calls gives the same outputs and the same state. Keys that come later never move
    earlier outputs, however loud: within rounding inside a chunk, not by one bit across chunks.

    Args:
        q: `(b, h, n, d)`.
        k: `(b, g, n, d)`, g dividing h.
        v: `(b, g, n, e)`.
        state: what came before; it is not changed, unless `consume`.
        query_map: the queries' features, with tensors `(g, ...)`.
        key_map: the keys' features, likewise; both logarithmic or neither.
        chunk_size: tokens per block, which trades speed and memory, never the result; None for what caches hold.
        mask: `(b, n)` bool or integer; a False key is as if absent, and a token that sees no key gives zeros.
        segments: `(b, n)` non-decreasing document ids; a token sees its own document, and `state` belongs to the
            first token's.
        log_decay: `(b, g, n)`, at most 0: key j weighs exp(sum of log_decay over j+1..i) at query i.
        log_gain: `(b, g, n)`: key j weighs exp(log_gain) times as much; for logarithmic maps.
        consume: the state may be overwritten, which spares a copy when decoding without gradients.

    Returns:
        `(b, h, n, e)` in q's dtype, and the state after the last token.

    Raises:
        ValueError: for a mask, segments or log_decay of another shape or dtype, or a state of another batch.
    """
    check_batch(k, state.sums)
    mask = check_per_key(k, mask=mask, segments=segments, log_decay=log_decay)
    b, dtype = k.shape[0], state.sums.dtype
    maps = Maps(query=query_map.to(dtype), key=key_map.to(dtype))
    if mask is not None and log_decay is not None:
        log_decay = log_decay.masked_fill(~mask[:, None], 0.0)
    documents = None if segments is None else torch.cat([segments[:, :1], segments], dim=-1)
    inputs = Inputs(q, k, v, log_gain, log_decay, mask, documents)
    leaves = (*inputs, *state, *maps.tensors)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    chunk_size = chunk_size or block_tokens(state, backward=wanted)
    after: Iterable[Tensor]
    with no_autocast(q.device):
        if q.shape[2] == 1 and segments is None and not wanted:
            out, after = attend_token(maps, inputs, State(*(x.flatten(0, 1) for x in state)), own=consume)
            return out, LinearState(*(x.unflatten(0, (b, -1)) for x in after))
        before = State(*(rearrange(x, "b g ... -> (g b) ...") for x in state))
        if torch.compiler.is_compiling():
            out, *after = attend_compiled(maps, chunk_size, inputs, before)
        elif wanted:
            out, *after = CausalAttention.apply(maps, chunk_size, *inputs, *before, *maps.tensors)
        else:
            trace = attend(maps, chunk_size, inputs, before, keep=False)
            out, after = trace.out.to(q.dtype), trace.after
    return out, LinearState(*(rearrange(x, "(g b) ... -> b g ...", b=b) for x in after))


class CausalAttention(torch.autograd.Function):
    """Attend to a sequence block by block, keeping no features.

    `apply(maps, chunk_size, *inputs, *state, *maps.tensors)` returns the output `(b, h, n, e)`, the next sums and their
    exponents, which carry no gradient.
    """

    @staticmethod
    def forward(ctx: Any, maps: Maps, chunk_size: int, *leaves: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Attend, and keep the state before each block."""
        inputs, state = Inputs(*leaves[:7]), State(*leaves[7:9])
        trace = attend(maps.with_tensors(leaves[9:]), chunk_size, inputs, state, keep=True)
        ctx.maps, ctx.chunk_size = maps, chunk_size
        ctx.save_for_backward(*leaves, *trace)
        sums, exponent = (x.clone() for x in trace.after)
        ctx.mark_non_differentiable(exponent)
        return trace.out.to(inputs.queries.dtype), sums, exponent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_sums: Tensor, _: Tensor) -> tuple[Any, ...]:
        """Walk the blocks from the end."""
        saved = ctx.saved_tensors  # once: recomputation gives them away
        leaves, trace, tensors = saved[:-5], Trace(*saved[-5:]), saved[9:-5]
        wanted = any(ctx.needs_input_grad[len(ctx.needs_input_grad) - len(tensors) :])
        maps, inputs = ctx.maps.with_tensors(tensors), Inputs(*leaves[:7])
        with no_autocast(grad.device):
            found, sums, totals = pull(maps, ctx.chunk_size, inputs, trace, grad, grad_sums, wanted=wanted)
        return None, None, *found, sums, None, *totals
