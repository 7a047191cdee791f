"""One block of causal linear attention: from tokens to features to what is seen, and back.

`dense.py` and `halves.py` do the sums; here a block's tokens become features, the form is chosen, and scales are kept.
Inside, logarithms are in units of log 2 and relative to an origin near them, as float32 is finest near zero; exponents
of the state are float64, so that nothing is lost between blocks.

Letters: `b` batch times key heads, `g` key heads, `r` queries per key, `n` tokens of the block, `t` tiles of `c`
tokens, `d` head width, `e` value width, `m` features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.linear.dense import Gradients, Tiles, attend_dense, fits_one_scale, pull_dense
from performer_lm.ops.linear.fading import Times, fading, pull_decay
from performer_lm.ops.linear.halves import Block, absorb, attend_halves, pull_absorb, pull_halves
from performer_lm.ops.linear.scratch import Scratch
from performer_lm.ops.linear.state import EMPTY
from performer_lm.ops.linear.tokens import Keys, Maps, State, Tokens, flat, open_keys, pull_map


class Seen(NamedTuple):
    """What a block's queries see, the exponent of the state after it, and whether the block was put on one scale."""

    weighted: Tensor  # (b, t, c, r, e + 1): numerators and denominators, on any scale per query
    exponent: Tensor  # (b, m)
    dense: bool


class Grads(NamedTuple):
    """Gradients at what a block gives."""

    seen: Tensor  # (b, n, r, e + 1)
    sums: Tensor  # (b, m, e + 1), after the block; used up


class Pulled(NamedTuple):
    """Gradients of one block."""

    queries: Tensor  # (b, n r, d)
    keys: Tensor  # (b, n, d)
    values: Tensor  # (b, n, e)
    log_gain: Tensor | None  # (b, n)
    log_decay: Tensor | None  # (b, n)
    sums: Tensor  # (b, m, e + 1)
    tensors: tuple[Tensor | None, ...]


def take_step(maps: Maps, tokens: Tokens, state: State, scratch: Scratch, *, after: Tensor) -> Seen:
    """Let a block attend to the state and itself, and join the state: its sums go to `after`, which may be the same."""
    keys = open_keys(maps, tokens, state.exponent, scratch)
    if not _on_one_scale(keys, tokens.times):
        return _step_halves(maps, tokens, keys, state.sums, scratch, after=after)
    tiles, factor = _tiles(maps, tokens, keys, scratch)
    _scale(state.sums, factor, out=after)
    weighted = attend_dense(tiles, after, scratch).unflatten(2, (tiles.keys.shape[2], -1)).transpose(0, 1)
    if keys.scale is None:
        return Seen(weighted, state.exponent, True)
    exponent = keys.base.absolute(keys.scale)
    return Seen(weighted, _settle(after, exponent) if tokens.times.fade else exponent, True)


def pull_step(
    maps: Maps,
    tokens: Tokens,
    state: State,
    exponent: Tensor,
    grads: Grads,
    scratch: Scratch,
    *,
    dense: bool,
    wanted: bool,
) -> Pulled:
    """Compute a block's features anew and pull gradients back through it.

    Args:
        maps: as in the forward.
        tokens: likewise.
        state: before the block.
        exponent: `(b, m)`, of the state after it.
        grads: at what the forward gave.
        scratch: memory to work in.
        dense: the form that the forward took; to choose again could choose otherwise, by a rounding.
        wanted: whether the maps' tensors want gradients.
    """
    keys = open_keys(maps, tokens, state.exponent, scratch)
    if dense:
        found = _pull_dense(maps, tokens, keys, state, exponent, grads, scratch)
    else:
        found = _pull_halves(maps, tokens, keys, state, grads, scratch)
    if tokens.mask is not None and not maps.key.logarithmic:
        found.keys.masked_fill_(~tokens.mask[..., None], 0.0)
    log_gain = log_decay = None
    if tokens.log_gain is not None or tokens.times.log_decay is not None:
        log_gain = found.keys.sum(dim=-1) if maps.key.logarithmic else _at_weights(found.keys, keys.rows)
    if tokens.times.log_decay is not None:
        assert log_gain is not None
        log_decay = pull_decay(log_gain, (found.sums * state.sums).sum(dim=(1, 2)))
    queries, query_tensors = pull_map(maps.query, tokens.queries, found.queries, tokens.groups, wanted)
    found_keys, key_tensors = pull_map(maps.key, tokens.keys, found.keys, tokens.groups, wanted)
    return Pulled(queries, found_keys, found.values, log_gain, log_decay, found.sums, (*query_tensors, *key_tensors))


def _per_token(x: Tensor, tokens: Tokens) -> Tensor:
    """View `(..., c r, e + 1)` as `(b, n, r, e + 1)`."""
    return x.reshape(*tokens.keys.shape[:2], -1, x.shape[-1])


def _at_weights(grad: Tensor, features: Tensor) -> Tensor:
    """Return the gradient at the logarithm of each token's weight `(b, n)`, given that at its features."""
    return (grad * features).sum(dim=-1)


# --- on one scale -----------------------------------------------------------------------------------------------------


def _on_one_scale(keys: Keys, times: Times) -> bool:
    """Tell whether a block can be put on one scale; where a look would make the host wait, it is said not to."""
    if keys.scale is None:
        return True
    return keys.rows.device.type == "cpu" and fits_one_scale(keys.rows, keys.base.before, keys.scale, times)


def _tiles(maps: Maps, tokens: Tokens, keys: Keys, scratch: Scratch) -> tuple[Tiles, Tensor | None]:
    """Put a block on one scale, using up its rows; also return what the state is to be multiplied by, `(b, m, 1)`."""
    queries = scratch("queries", *tokens.queries.shape[:2], keys.rows.shape[-1])
    out, factor = flat(queries, tokens.groups), None
    if keys.scale is None:
        maps.query.write(flat(tokens.queries, tokens.groups), out, add=False)
    else:
        queries.copy_(keys.scale.expand_as(queries))
        maps.query.write(flat(tokens.queries, tokens.groups), out, add=True)
        queries.sub_(queries.amax(dim=-1, keepdim=True)).exp2_()
        keys.rows.sub_(keys.scale).exp2_()
        factor = (keys.base.before - keys.scale).clamp_(max=1.0).exp2_().to(queries.dtype).mT
    count = tokens.tiles
    queries, rows, values = (x.unflatten(1, (count, -1)) for x in (queries, keys.rows, tokens.values))
    return Tiles(queries, rows, values, fading(tokens.times, count, scratch.triangle(rows.shape[2]))), factor


def _scale(sums: Tensor, factor: Tensor | None, *, out: Tensor) -> Tensor:
    return out.copy_(sums) if factor is None else torch.mul(sums, factor, out=out)


def _settle(sums: Tensor, exponent: Tensor) -> Tensor:
    """Put sums that faded, in place, on the exponent at which each feature's mass is about one; return that."""
    mass = sums[..., -1]
    empty = mass == 0
    lower = mass.masked_fill(empty, 1.0).log2().round_()
    sums.mul_(lower.neg().exp2_()[..., None])
    return (exponent + lower).masked_fill_(empty, EMPTY)


def _pull_dense(
    maps: Maps, tokens: Tokens, keys: Keys, state: State, exponent: Tensor, grads: Grads, scratch: Scratch
) -> Gradients:
    if keys.scale is not None and tokens.times.fade:
        higher = (keys.base.absolute(keys.scale) - exponent).masked_fill_(exponent == EMPTY, 0.0)
        grads.sums.mul_(higher.exp2_().to(grads.sums.dtype)[..., None])
    tiles, factor = _tiles(maps, tokens, keys, scratch)
    sums = _scale(state.sums, factor, out=scratch("sums", *state.sums.shape))
    grad = grads.seen.view(*tiles.queries.shape[:3], -1)
    queries, rows, values, grad_sums = pull_dense(tiles, sums, grad, grads.sums, scratch)
    if factor is None:
        return Gradients(queries.flatten(1, 2), rows.flatten(1, 2), values, grad_sums)
    queries, rows = tiles.queries.mul_(queries), tiles.keys.mul_(rows)  # at the logarithms, in the features' place
    return Gradients(queries.flatten(1, 2), rows.flatten(1, 2), values, grad_sums.mul_(factor))


# --- in halves --------------------------------------------------------------------------------------------------------


def _in_logs(maps: Maps, tokens: Tokens, keys: Keys, scratch: Scratch) -> Block:
    queries = scratch("queries", *tokens.queries.shape[:2], keys.rows.shape[-1])
    maps.query.write(flat(tokens.queries, tokens.groups), flat(queries, tokens.groups), add=False)
    return Block(_per_token(queries, tokens), keys.rows, tokens.values, tokens.times)


def _step_halves(maps: Maps, tokens: Tokens, keys: Keys, sums: Tensor, scratch: Scratch, *, after: Tensor) -> Seen:
    block = _in_logs(maps, tokens, keys, scratch)
    seen = attend_halves(block, sums, keys.base.before).weighted[:, None]
    found, scale = absorb(block, sums, keys.base.before)
    after.copy_(found)
    return Seen(seen, keys.base.absolute(scale), False)


def _pull_halves(maps: Maps, tokens: Tokens, keys: Keys, state: State, grads: Grads, scratch: Scratch) -> Gradients:
    block = _in_logs(maps, tokens, keys, scratch)
    found = pull_halves(block, state.sums, keys.base.before, grads.seen)
    pull_absorb(block, keys.base.before, grads.sums, found)
    return Gradients(found.queries.flatten(1, 2), found.keys, found.values[..., :-1], found.sums)
