"""Linear attention by its definition, to test the engine against and to fall back on where a chunk needs it.

    out_i = sum over j <= i of w_ij v_j / sum over j <= i of w_ij
    w_ij  = exp(sum of log_decay over j+1..i) * sum over m of phi_m(q_i) phi_m(k_j)

Features are given as natural logarithms, so that nothing overflows or vanishes; those of a map that is no exponential
are logarithms of its values. Memory is O(i j m).

Letters: `i` queries, `j` keys, `m` features, `e` value width, after any leading dimensions.
"""

import torch
from torch import Tensor


def log_weights(queries: Tensor, keys: Tensor, *, visible: Tensor, fading: Tensor | None = None) -> Tensor:
    """Compute log w_ij `(..., i, j)` from log features `(..., i, m)` and `(..., j, m)`; -inf where not `visible`.

    `fading` `(..., i, j)` is the sum of log_decay. What is not visible may hold anything, and gets no gradient.
    """
    found = (queries[..., :, None, :] + keys[..., None, :, :]).logsumexp(dim=-1)
    return (found if fading is None else found + fading).masked_fill(~visible, -torch.inf)


def quadratic(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> Tensor:
    """Attend by the i x j matrix of weights.

    Args:
        queries: `(b, h, i, m)` log features; causal, the last query stands at the last key.
        keys: `(b, g, j, m)` log features.
        values: `(b, g, j, e)`.
        causal: whether a query sees the keys up to its own place alone.
        mask: `(b, j)` bool; a False key is as if absent, and its decay with it.
        segments: `(b, j)` document ids; a token sees its own document alone.
        log_decay: `(b, g, j)`, at most 0; causal only.

    Returns:
        `(b, h, i, e)`; zeros for a query that sees no key.
    """
    group, (i, j) = queries.shape[1] // keys.shape[1], (queries.shape[2], keys.shape[2])
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    places = torch.arange(j, device=keys.device)
    visible = (places <= places[j - i :, None] if causal else places.new_ones(i, j, dtype=torch.bool))[None, None]
    if mask is not None:
        visible = visible & mask[:, None, None]
        keys = keys.masked_fill(~mask[:, None, :, None], 0.0)
    if segments is not None:
        visible = visible & (segments[:, None, j - i :, None] == segments[:, None, None])
    fading = None
    if log_decay is not None:
        log_decay = log_decay if mask is None else log_decay.masked_fill(~mask[:, None], 0.0)
        total = log_decay.repeat_interleave(group, dim=1).cumsum(dim=-1)
        fading = total[..., j - i :, None] - total[..., None, :]
    weights = log_weights(queries, keys, visible=visible, fading=fading).softmax(dim=-1)
    return weights.masked_fill(~visible, 0.0) @ values


def recurrent(queries: Tensor, keys: Tensor, values: Tensor, *, log_decay: Tensor | None = None) -> Tensor:
    """Attend token by token, causally: S_t = exp(log_decay_t) S_(t-1) + phi(k_t) [v_t, 1]^T, out_t = phi(q_t)^T S_t.

    For features that floats can hold: here they leave their logarithms. Arguments are those of `quadratic`.
    """
    group = queries.shape[1] // keys.shape[1]
    weights, keys = queries.exp().unflatten(1, (-1, group)), keys.exp()
    values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    state, out = torch.zeros_like(keys[:, :, 0, :, None] * values[:, :, 0, None]), []
    for t in range(keys.shape[2]):
        state = state if log_decay is None else log_decay[:, :, t, None, None].exp() * state
        state = state + keys[:, :, t, :, None] * values[:, :, t, None]
        out.append(torch.einsum("bgrm,bgme->bgre", weights[:, :, :, t], state))
    seen = torch.stack(out, dim=3).flatten(1, 2)
    return seen[..., :-1] / seen[..., -1:]
