"""One token: the step of decoding, which joins the state and then reads it.

That is what attending is where no gradient is wanted. It is a handful of small operations, so each of them counts.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `d` head width, `e` value width, `m`
features.
"""

import torch
from torch import Tensor

from performer_lm.ops.linear.state import LinearState
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.maps import BlockMap, Maps
from performer_lm.ops.precision import LOG2_E

ROOM = 40.0
"""How far above the stored exponent a key may lie (in factors of 2) before the sums are put on a higher one."""


def attend_token(maps: Maps, tokens: Tokens, state: LinearState, *, own: bool) -> tuple[Tensor, LinearState]:
    """Attend from a sequence of one token: `(b, h, 1, e)` and the next state.

    A state that is its `own` to use is written into.
    """
    b, g, _, e = tokens.values.shape
    sums = (state.sums if own else state.sums.clone()).flatten(0, 1)
    values = torch.cat([tokens.values.to(sums.dtype), sums.new_ones(b, g, 1, 1)], dim=-1).flatten(0, 1)
    queries, keys = _features(maps, tokens, sums)
    if maps.key.logarithmic:
        queries, keys, exponent = _weights(maps, tokens, queries, keys, sums, state.exponent.flatten(0, 1))
    else:
        exponent = state.exponent.flatten(0, 1)
        if tokens.log_decay is not None:
            sums.mul_(tokens.log_decay.to(sums.dtype).exp().view(-1, 1, 1))
        if tokens.mask is not None:
            keys = keys * tokens.mask[:, None, None]
    sums.addcmul_(keys.flatten(0, 1).mT, values)
    seen = torch.bmm(queries.flatten(0, 1), sums)
    mass = seen[..., e:]
    if tokens.mask is not None:
        mass = mass.masked_fill(mass == 0, 1.0)
    out = (seen[..., :e] / mass).view(b, -1, 1, e)
    return out.to(tokens.queries.dtype), LinearState(sums.view_as(state.sums), exponent.view_as(state.exponent))


def _weights(
    maps: Maps, tokens: Tokens, queries: Tensor, keys: Tensor, sums: Tensor, exponent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn log features into weights over the state's exponents; return these as they are now, `((b g), m)`.

    Only where a key rises far above them are the sums put on higher ones, as that is a pass over the state. Where a
    look would make the host wait, it is done at every token. Decay lowers exponents and leaves sums as they are.
    """
    b, g = keys.shape[:2]
    exponent = exponent.view(b, g, 1, -1)
    if tokens.log_decay is not None:
        exponent = exponent + LOG2_E * tokens.log_decay[..., None]
    keys = keys.to(exponent.dtype)
    gain = maps.key.gain(tokens.keys.transpose(0, 1)[:, :, 0])
    if gain is not None:
        keys = keys + LOG2_E * gain.mT[..., None, None]
    if tokens.log_gain is not None:
        keys = keys + LOG2_E * tokens.log_gain[..., None]
    if tokens.mask is not None:
        keys = keys.masked_fill(~tokens.mask[:, None, :, None], -torch.inf)
    rise = keys - exponent
    if _must_look_blindly(rise) or float(rise.amax()) > ROOM:
        higher = torch.maximum(exponent, keys)
        sums.mul_((exponent - higher).exp2_().to(sums.dtype).view(*sums.shape[:2], 1))
        exponent, rise = higher, keys - higher
    queries = queries + exponent
    queries = (queries - queries.amax(dim=-1, keepdim=True)).to(sums.dtype).exp2_()
    return queries, rise.to(sums.dtype).exp2_(), exponent.reshape(b * g, -1)


def _must_look_blindly(x: Tensor) -> bool:
    """Return True if the host should not look at x: it would wait for a device, or break a compiled graph."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def _features(maps: Maps, tokens: Tokens, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of queries and keys: `(b, g, r, m)` and `(b, g, 1, m)`."""
    b, g, _, d = tokens.keys.shape  # einops would take as long as the products do
    queries = tokens.queries.to(sums.dtype).reshape(b, g, -1, d).transpose(0, 1)
    keys = tokens.keys.to(sums.dtype).transpose(0, 1)
    if maps.query.writes_like(maps.key):  # one product reads the projection once
        both = _write(maps.key, torch.cat([queries, keys], dim=2), sums.shape[1])
        return both[:, :, :-1], both[:, :, -1:]
    return _write(maps.query, queries, sums.shape[1]), _write(maps.key, keys, sums.shape[1])


def _write(a_map: BlockMap, x: Tensor, num_features: int) -> Tensor:
    """Write the features of x `(g, b, r, d)`: `(b, g, r, m)`."""
    out = x.new_empty(*x.shape[:3], num_features)
    a_map.write(x.flatten(1, 2), out.flatten(1, 2), add=False)
    return out.transpose(0, 1)
