"""Linear attention: out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j), in time linear in n.

Keys and values are absorbed into a state of fixed size, which queries read. The causal form does both block by block,
with the state going in and coming out, so training, prefill and decoding are one function. Features are any
`FeatureMap`; sums are float32 or wider, on a running scale per feature, and no epsilon is added to anything.

`causal.py` is the loop over blocks and its backward; `dense.py` and `halves.py` are the two forms
of one block.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `i` queries, `j` keys, `n` tokens, `d` head
width, `e` value width, `m` features.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from performer_lm.ops.features import BlockMap, FeatureMap
from performer_lm.ops.linear.block import Maps, State
from performer_lm.ops.linear.causal import CausalAttention, Inputs, run, run_token
from performer_lm.ops.linear.documents import Packed, attend_in_documents
from performer_lm.ops.linear.halves import EMPTY, scaled_exp
from performer_lm.ops.softmax import no_autocast


class LinearState(NamedTuple):
    """What linear attention keeps of the keys it has seen: the sums of phi(k) [v, 1] over exp(log_scale)."""

    sums: Tensor  # (b, g, m, e + 1)
    log_scale: Tensor  # (b, g, m): near the running maximum of the keys' log features; -1e30 before any key


def empty_state(
    batch: int, key_heads: int, num_features: int, dim_value: int, *, device: torch.device, dtype: torch.dtype
) -> LinearState:
    """Return the state of no keys, in float32 unless `dtype` is wider."""
    sums = torch.zeros(
        batch, key_heads, num_features, dim_value + 1, device=device, dtype=torch.promote_types(dtype, torch.float32)
    )
    return LinearState(sums, torch.full_like(sums[..., 0], EMPTY))


def _fold(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _per_head(x: Tensor | None, heads: int) -> Tensor | None:
    """Repeat what is one per row of the batch over its key heads: `(b, n)` -> `(b g, n)`."""
    return None if x is None else x.repeat_interleave(heads, dim=0)


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState,
    *,
    query_map: BlockMap,
    key_map: BlockMap,
    chunk_size: int = 64,
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
        chunk_size: tokens per block. It trades speed and memory, never the result.
        mask: `(b, n)` bool; a False key is as if absent, and a token that sees no key gives zeros.
        segments: `(b, n)` non-decreasing document ids; a token sees its own document, and `state` belongs to the
            first token's.
        log_decay: `(b, g, n)`, at most 0: key j weighs exp(sum of log_decay over j+1..i) at query i.
        log_gain: `(b, g, n)`: key j weighs exp(log_gain) times as much; for logarithmic maps.
        consume: the state may be overwritten, which spares a copy when decoding without gradients.

    Returns:
        `(b, h, n, e)` in q's dtype, and the state after the last token.
    """
    b, g = k.shape[:2]
    dtype = state.sums.dtype
    maps = Maps(query=query_map.spread(b, dtype), key=key_map.spread(b, dtype))
    inputs = Inputs(
        queries=q.reshape(b * g, -1, *q.shape[2:]),
        keys=_fold(k),
        values=_fold(v),
        log_gain=None if log_gain is None else _fold(log_gain),
        mask=_per_head(mask, g),
        log_decay=None if log_decay is None else _fold(log_decay),
        documents=None if segments is None else _per_head(torch.cat([segments[:, :1], segments], dim=-1), g),
    )
    before = State(*(_fold(x) for x in state))
    if inputs.mask is not None and inputs.log_decay is not None:
        inputs = inputs._replace(log_decay=inputs.log_decay.masked_fill(~inputs.mask, 0.0))
    leaves = (*inputs, *before, *maps.tensors)
    with no_autocast(q.device):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
            out, *after = CausalAttention.apply(maps, chunk_size, *leaves)
        elif q.shape[2] == 1:
            out, after = run_token(maps, inputs, before, own=consume)
        else:
            trace = run(maps, chunk_size, inputs, before, keep=False)
            out, after = trace.out.to(q.dtype), trace.states[-1]
    out = out.reshape(*q.shape[:3], -1)
    return out, LinearState(*(x.unflatten(0, (b, g)) for x in after))


def bidirectional_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    *,
    query_map: BlockMap,
    key_map: BlockMap,
    chunk_size: int = 64,
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
    state = empty_state(b, g, key_map.tensors[0].shape[1], v.shape[-1], device=k.device, dtype=k.dtype)
    dtype = state.sums.dtype
    keys, values = _fold(k).to(dtype), _fold(v).to(dtype)
    gain = None if log_gain is None else _fold(log_gain).to(dtype)
    if mask is not None:
        hidden = ~mask.repeat_interleave(g, dim=0)
        keys, values = (x.masked_fill(hidden[..., None], 0.0) for x in (keys, values))
        gain = torch.zeros_like(keys[..., 0]) if gain is None else gain
        gain = gain.masked_fill(hidden, -torch.inf)
    packed = Packed(
        queries=rearrange(q, "b (g r) n d -> (b g) r n d", g=g).to(dtype),
        keys=keys,
        values=_with_ones(values),
        log_gain=gain,
        documents=torch.cat([segments[:, :1], segments], dim=-1).repeat_interleave(g, dim=0),
    )
    maps = Maps(query=query_map.spread(b, dtype), key=key_map.spread(b, dtype))
    with no_autocast(q.device):
        out = attend_in_documents(maps, packed, State(*(_fold(x) for x in state)), chunk_size)
    return rearrange(out, "(b g) r n e -> b (g r) n e", b=b).to(q.dtype)


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)


def _absorb(
    k: Tensor, v: Tensor, mask: Tensor | None, log_gain: Tensor | None, state: LinearState, key_map: FeatureMap
) -> tuple[Tensor, Tensor]:
    sums, log_scale = state
    if mask is not None:
        k, v = (x.masked_fill(~mask[..., None], 0.0) for x in (k, v))
    features = key_map(k)
    weights, factor = features.values, None
    if features.log_scale is not None:
        logs = features.log_scale if log_gain is None else features.log_scale + log_gain[..., None]
        logs = logs if mask is None else logs.masked_fill(~mask[..., None], -torch.inf)
        scale = torch.maximum(log_scale, logs.detach().amax(dim=1))
        factor, log_scale = (log_scale - scale).exp()[..., None], scale
        weights = _times((logs - scale[:, None]).exp(), weights)
    assert weights is not None
    if mask is not None:
        weights = weights * mask[..., None]
    return torch.baddbmm(sums if factor is None else factor * sums, weights.mT, _with_ones(v)), log_scale


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def absorb_keys(
    k: Tensor,
    v: Tensor,
    state: LinearState,
    *,
    key_map: FeatureMap,
    chunk_size: int = 64,
    mask: Tensor | None = None,
    log_gain: Tensor | None = None,
) -> LinearState:
    """Append keys `(b, g, j, d)` and values `(b, g, j, e)` to `state` without asking anything of it."""
    b, g = k.shape[:2]
    dtype = state.sums.dtype
    key_map = key_map.spread(b, dtype)
    mask, log_gain = _per_head(mask, g), None if log_gain is None else _fold(log_gain)
    found = LinearState(*(_fold(x) for x in state))
    with no_autocast(k.device):
        for start in range(0, k.shape[-2], chunk_size):
            k_, v_ = (_fold(x[:, :, start : start + chunk_size]).to(dtype) for x in (k, v))
            mask_, gain_ = (None if x is None else x[:, start : start + chunk_size] for x in (mask, log_gain))
            found = LinearState(
                *checkpoint(
                    _absorb, k_, v_, mask_, gain_, found, key_map, use_reentrant=False, preserve_rng_state=False
                )
            )
    return LinearState(*(x.unflatten(0, (b, g)) for x in found))


def _read(q: Tensor, state: LinearState, query_map: FeatureMap) -> Tensor:
    features = query_map(q)
    weights = features.values
    if features.log_scale is not None:
        weights = _times(scaled_exp(features.log_scale + state.log_scale[:, None])[0], features.values)
    assert weights is not None
    seen = weights @ state.sums
    mass = seen[..., -1:]
    return seen[..., :-1] / mass.masked_fill(mass == 0, 1.0)


def read_state(q: Tensor, state: LinearState, *, query_map: FeatureMap, chunk_size: int = 64) -> Tensor:
    """Attend from q `(b, h, i, d)` to all that `state` holds, in no order: `(b, h, i, e)` in q's dtype."""
    b, g = state.sums.shape[:2]
    query_map, state = query_map.spread(b, state.sums.dtype), LinearState(*(_fold(x) for x in state))
    outputs = []
    with no_autocast(q.device):
        for q_ in q.split(chunk_size, dim=-2):
            rows = rearrange(q_, "b (g r) i d -> (b g) (r i) d", g=g).to(state.sums.dtype)
            out = checkpoint(_read, rows, state, query_map, use_reentrant=False, preserve_rng_state=False)
            outputs.append(rearrange(out, "(b g) (r i) e -> b (g r) i e", b=b, i=q_.shape[-2]))
    return torch.cat(outputs, dim=-2).to(q.dtype)
