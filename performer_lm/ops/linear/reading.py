"""Linear attention without an order: keys join a state, and queries read all that it holds.

This takes any `FeatureMap`, signed ones too. Features live one block of tokens long, and are computed anew backward.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `i` queries, `j` keys, `d` head width, `e`
value width, `m` features. Inside, batch and key heads are one dimension `(g b)`.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from performer_lm.ops.checks import check_batch, check_per_key
from performer_lm.ops.linear.state import LinearState, add_gains, block_tokens, rebase
from performer_lm.ops.maps import LOG2_E, FeatureMap
from performer_lm.ops.softmax import no_autocast


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
    """Append keys to `state` without asking anything of it.

    Args:
        k: `(b, g, j, d)`.
        v: `(b, g, j, e)`.
        state: what came before; it is not changed.
        key_map: the keys' features, with tensors `(g, ...)`.
        chunk_size: keys per block, which trades speed and memory, never the result; None for what caches hold.
        mask: `(b, j)` bool or integer; a False key is as if absent.
        log_gain: `(b, g, j)`: key j weighs exp(log_gain) times as much; for logarithmic maps.

    Raises:
        ValueError: for a mask of another shape or dtype, or a state of another batch.
    """
    check_batch(k, state.sums)
    mask = check_per_key(k, mask=mask, segments=None, log_decay=None)
    b, dtype, chunk_size = (
        k.shape[0],
        state.sums.dtype,
        chunk_size or block_tokens(state, backward=torch.is_grad_enabled()),
    )
    key_map = key_map.to(dtype)
    sums, exponent = (rearrange(x, "b g ... -> (g b) ...") for x in state)
    with no_autocast(k.device):
        for start in range(0, k.shape[-2], chunk_size):
            part = slice(start, start + chunk_size)
            keys, values = (x[:, :, part].transpose(0, 1).to(dtype) for x in (k, v))
            hidden = None if mask is None else ~mask[:, part]
            gain = None if log_gain is None else log_gain[:, :, part].transpose(0, 1)
            sums, exponent = checkpoint(
                _absorb,
                *(keys, values, hidden, gain, sums, exponent, key_map),
                use_reentrant=False,
                preserve_rng_state=False,
            )
    return LinearState(*(rearrange(x, "(g b) ... -> b g ...", b=b) for x in (sums, exponent)))


def read_state(q: Tensor, state: LinearState, *, query_map: FeatureMap, chunk_size: int | None = None) -> Tensor:
    """Attend from q `(b, h, i, d)` to all that `state` holds, in no order: `(b, h, i, e)` in q's dtype."""
    check_batch(q, state.sums)
    if not q.shape[2]:
        return q.new_zeros(*q.shape[:-1], state.sums.shape[-1] - 1)
    b, g = state.sums.shape[:2]
    dtype, chunk_size = state.sums.dtype, chunk_size or block_tokens(state, backward=torch.is_grad_enabled())
    query_map = query_map.to(dtype)
    sums, exponent = (rearrange(x, "b g ... -> (g b) ...") for x in state)
    scale = (exponent - exponent.amax(dim=-1, keepdim=True)).to(dtype)
    outputs = []
    with no_autocast(q.device):
        for part in q.split(chunk_size, dim=-2):
            rows = rearrange(part.to(dtype), "b (g r) i d -> g (b r i) d", g=g)
            out = checkpoint(_read, rows, sums, scale, query_map, use_reentrant=False, preserve_rng_state=False)
            outputs.append(rearrange(out, "(g b) (r i) e -> b (g r) i e", b=b, i=part.shape[-2]))
    return torch.cat(outputs, dim=-2).to(q.dtype)


def _absorb(
    keys: Tensor,
    values: Tensor,
    hidden: Tensor | None,
    log_gain: Tensor | None,
    sums: Tensor,
    exponent: Tensor,
    key_map: FeatureMap,
) -> tuple[Tensor, Tensor]:
    """Return the sums and exponents after a block of keys `(g, b, j, d)`, those `hidden` `(b, j)` being absent."""
    g = keys.shape[0]
    if hidden is not None:
        keys, values = (x.masked_fill(hidden[..., None], 0.0) for x in (keys, values))
        hidden = hidden.repeat(g, 1)[..., None]
    flat = keys.flatten(1, 2)
    weights, logs = (None if x is None else x.reshape(len(sums), -1, sums.shape[1]) for x in key_map(flat))
    if logs is not None:
        gain = add_gains(key_map.gain(flat), None if log_gain is None else log_gain.flatten(1, 2))
        shift, before, _ = base = rebase(None if gain is None else gain.reshape(len(sums), -1), exponent)
        logs = LOG2_E * logs if shift is None else LOG2_E * logs + shift.to(logs.dtype)
        logs = logs if hidden is None else logs.masked_fill(hidden, -torch.inf)
        scale = torch.maximum(before.to(logs.dtype), logs.detach().amax(dim=1, keepdim=True))
        sums = sums * (before - scale).clamp(max=1.0).exp2().to(sums.dtype).mT
        weights = _times((logs - scale).exp2(), weights)
        exponent = base.absolute(scale)
    assert weights is not None
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0.0)
    values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1).flatten(0, 1)
    return torch.baddbmm(sums, weights.mT, values), exponent


def _read(rows: Tensor, sums: Tensor, scale: Tensor, query_map: FeatureMap) -> Tensor:
    """Return what queries `(g, n, d)` see of sums over 2^scale `((g b), m)`: `((g b), n, e)`."""
    weights, logs = (None if x is None else x.reshape(len(sums), -1, sums.shape[1]) for x in query_map(rows))
    if logs is not None:
        logs = LOG2_E * logs + scale[:, None]
        weights = _times((logs - logs.detach().amax(dim=-1, keepdim=True)).exp2(), weights)
    assert weights is not None
    seen = weights @ sums
    mass = seen[..., -1:]
    return seen[..., :-1] / mass.masked_fill(mass == 0, 1.0)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
