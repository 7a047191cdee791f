"""Linear attention as its callers see it.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `d` head width, `e` value width, `m` features.
"""

import torch
from torch import Tensor

from performer_lm.ops.checks import check_batch, check_per_key
from performer_lm.ops.linear import signed
from performer_lm.ops.linear.operator import run
from performer_lm.ops.linear.state import LinearState, empty_state
from performer_lm.ops.linear.step import attend_token
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.linear.triton import Kernel
from performer_lm.ops.maps import BlockMap, FeatureMap, Maps
from performer_lm.ops.precision import LOG2_E, no_autocast


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
    kernel: Kernel = "auto",
) -> tuple[Tensor, LinearState]:
    """Append n tokens to `state`, each attending to all before it and itself: the output and the next state.

    Any split of a sequence over calls gives the same outputs and the same state. Keys that come later never move
    earlier outputs, however loud: within rounding inside a block, not by one bit across blocks.

    Args:
        q: `(b, h, n, d)`.
        k: `(b, g, n, d)`, g dividing h.
        v: `(b, g, n, e)`.
        state: what came before; it is not changed, unless `consume`.
        query_map: the queries' features, with tensors `(g, ...)`.
        key_map: the keys' features; both logarithmic or neither.
        chunk_size: tokens per block, which trades speed and memory, never the result; None for what the device holds.
        mask: `(b, n)` bool or integer; a False key is as if absent, and a token that sees no key gives zeros.
        segments: `(b, n)` non-decreasing document ids; a token sees its own document, and `state` belongs to the
            first token's.
        log_decay: `(b, g, n)`, at most 0: key j weighs exp(sum of log_decay over j+1..i) at query i.
        log_gain: `(b, g, n)`: key j weighs exp(log_gain) times as much; for logarithmic maps.
        consume: the state may be overwritten, which spares a copy when decoding without gradients.
        kernel: `torch`, `triton`, or `auto`: Triton's where they run (`triton/__init__.py`).

    Returns:
        `(b, h, n, e)` in q's dtype, and the state after the last token.

    Raises:
        ValueError: for a mask, segments or log_decay of another shape or dtype, a state of another batch, or
            `triton` where its kernels do not run.
    """
    check_batch(k, state.sums)
    mask = check_per_key(k, mask=mask, segments=segments, log_decay=log_decay)
    if mask is not None and log_decay is not None:
        log_decay = log_decay.masked_fill(~mask[:, None], 0.0)
    dtype = state.sums.dtype
    maps = Maps(query=query_map.to(dtype), key=key_map.to(dtype), groups=k.shape[1])
    tokens = Tokens(q, k, v, log_gain, log_decay, mask, None if segments is None else _documents(segments))
    if q.shape[2] == 1 and segments is None:
        leaves = (*tokens, *state, *maps.tensors)
        if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)):
            with no_autocast(q.device):
                return attend_token(maps, tokens, state, own=consume)
    trace, after = run(maps, tokens, state, chunk_size, kernel)
    return trace.out.to(q.dtype), after


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
    kernel: Kernel = "auto",
) -> Tensor:
    """Attend from each token to all of its own document, before and after it: `(b, h, n, e)` in q's dtype.

    Arguments are those of `causal_linear_attention`, which runs twice: over the tokens, and over the tokens in reverse
    with every key one place later, so that a token's own key, which the first pass has seen, is not seen again. Both
    outputs are averages, to be joined by their masses. Without documents, `absorb_keys` and `read_state` do the same
    for less.
    """
    mask = check_per_key(k, mask=mask, segments=segments, log_decay=None)
    (b, g, n, d), dtype = k.shape, torch.promote_types(k.dtype, torch.float32)
    maps = Maps(query=query_map.to(dtype), key=key_map.to(dtype), groups=g)
    features = next(x for x in maps.key(k.new_zeros(g, 1, d, dtype=dtype)) if x is not None)
    state = empty_state(b, g, features.shape[-1], v.shape[-1], device=k.device, dtype=dtype)
    mask = k.new_ones(b, n, dtype=torch.bool) if mask is None else mask
    forth, _ = run(maps, Tokens(q, k, v, log_gain, None, mask, _documents(segments)), state, chunk_size, kernel)
    turned, own = (x.flip(-1) for x in (segments, mask))
    follows = torch.nn.functional.pad(own[:, :-1] & (turned[:, 1:] == turned[:, :-1]), (1, 0))
    q_back, *later = (x.flip(2) for x in (q, k, v))
    k_back, v_back = (x.roll(1, dims=2) for x in later)
    gain_back = None if log_gain is None else log_gain.flip(2).roll(1, dims=2)
    tokens = Tokens(q_back, k_back, v_back, gain_back, None, follows, _documents(turned))
    back, _ = run(maps, tokens, state, chunk_size, kernel)
    share = _share(forth.mass, back.mass.flip(2), logarithmic=key_map.logarithmic)[..., None].to(forth.out.dtype)
    return (share * forth.out + (1.0 - share) * back.out.flip(2)).to(q.dtype)


def _share(one: Tensor, other: Tensor, *, logarithmic: bool) -> Tensor:
    """Return the share of one mass in both; 0 where there is nothing."""
    if logarithmic:
        return torch.sigmoid(((one - other) / LOG2_E).masked_fill(one == -torch.inf, -torch.inf))
    return one / (one + other).masked_fill(one == 0, 1.0)


def absorb_keys(
    k: Tensor,
    v: Tensor,
    state: LinearState,
    *,
    key_map: FeatureMap,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    log_gain: Tensor | None = None,
) -> LinearState:
    """Append keys `(b, g, j, d)` and values `(b, g, j, e)` to `state` without asking anything of it.

    Arguments are those of `causal_linear_attention`, but that any map will do.

    Raises:
        ValueError: for a mask of another shape or dtype, or a state of another batch.
    """
    check_batch(k, state.sums)
    mask = check_per_key(k, mask=mask, segments=None, log_decay=None)
    if not isinstance(key_map, BlockMap):
        return signed.absorb(k, v, state, key_map=key_map, mask=mask)
    none = k[:, :1, :, :].new_empty(k.shape[0], 0, *k.shape[2:])
    key_map = key_map.to(state.sums.dtype)
    maps = Maps(query=key_map, key=key_map, groups=k.shape[1])
    return run(maps, Tokens(none, k, v, log_gain, None, mask, None), state, chunk_size)[1]


def read_state(q: Tensor, state: LinearState, *, query_map: FeatureMap, chunk_size: int | None = None) -> Tensor:
    """Attend from q `(b, h, i, d)` to all that `state` holds, in no order: `(b, h, i, e)` in q's dtype."""
    check_batch(q, state.sums)
    b, g, _, width = state.sums.shape
    if not isinstance(query_map, BlockMap):
        return signed.read(q, state, query_map=query_map)
    keys, values = (q.new_empty(b, g, 0, size) for size in (q.shape[-1], width - 1))
    query_map = query_map.to(state.sums.dtype)
    maps = Maps(query=query_map, key=query_map, groups=g)
    return run(maps, Tokens(q, keys, values, None, None, None, None), state, chunk_size)[0].out.to(q.dtype)


def _documents(segments: Tensor) -> Tensor:
    """Put the first token's document before it `(b, 1 + n)`: the state belongs to that."""
    return torch.cat([segments[:, :1], segments], dim=-1)
