"""Attention without an order by features that may be negative: no engine of weights, as their sums may vanish.

Autograd differentiates it, and keeps its features; it is for study.

Letters: as in `causal.py`.
"""

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.ops.linear.state import LinearState
from performer_lm.ops.maps import FeatureMap
from performer_lm.ops.precision import LOG2_E


def absorb(k: Tensor, v: Tensor, state: LinearState, *, key_map: FeatureMap, mask: Tensor | None) -> LinearState:
    """Append keys to the state, as `absorb_keys` does."""
    dtype = state.sums.dtype
    weights, logs = _map(key_map, k.to(dtype), k.shape[1])
    exponent = state.exponent
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, :, None], 0.0)
    exponent = torch.maximum(state.exponent, LOG2_E * logs.detach().amax(dim=2).to(state.exponent.dtype))
    weights = weights * (LOG2_E * logs - exponent[:, :, None]).exp2().to(dtype)
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).to(dtype)
    sums = state.sums * (state.exponent - exponent).exp2().to(dtype)[..., None]
    return LinearState(sums + weights.mT @ values, exponent)


def read(q: Tensor, state: LinearState, *, query_map: FeatureMap) -> Tensor:
    """Attend to all that the state holds, as `read_state` does."""
    dtype, g = state.sums.dtype, state.sums.shape[1]
    weights, logs = _map(query_map, q.to(dtype), g)
    rows = rearrange(weights, "b (g r) i m -> b g (r i) m", g=g)
    logs = rearrange(logs, "b (g r) i m -> b g (r i) m", g=g) * LOG2_E + state.exponent[:, :, None].to(dtype)
    seen = (rows * (logs - logs.detach().amax(dim=-1, keepdim=True)).exp2()) @ state.sums
    mass = seen[..., -1:]
    out = seen[..., :-1] / mass.masked_fill(mass == 0, 1.0)
    return rearrange(out, "b g (r i) e -> b (g r) i e", i=q.shape[2]).to(q.dtype)


def _map(a_map: FeatureMap, x: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """Map vectors `(b, g r, n, d)` to features `(b, g r, n, m)`: values, and the natural logarithms of their scales."""
    values, logs = a_map.to(x.dtype)(rearrange(x, "b (g r) n d -> g (b r n) d", g=g))
    assert values is not None
    logs = torch.zeros_like(values) if logs is None else logs
    values, logs = (
        rearrange(part, "g (b r n) m -> b (g r) n m", b=x.shape[0], n=x.shape[2]) for part in (values, logs)
    )
    return values, logs
