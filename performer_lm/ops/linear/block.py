"""One block of causal linear attention: from tokens to features to what is seen, and back.

`dense.py` and `halves.py` do the sums; here a block's keys become features, the form is chosen, and
scales are kept. Logarithms are held relative to an origin near them, as float32 is finest near zero.

Letters: `b` batch times key heads, `r` queries per key, `n` tokens of the block, `t` tiles of `c` tokens, `d` head
width, `e` value width, `m` features.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.ops.features import BlockMap
from performer_lm.ops.linear.dense import (
    Gradients,
    Weighing,
    absorb_dense,
    attend_dense,
    fits_one_scale,
    pull_dense,
    weigh,
)
from performer_lm.ops.linear.fading import Times, fading
from performer_lm.ops.linear.halves import EMPTY, Block, attend_halves, fade_to_end

TILE = 64
"""Tokens that see each other through a matrix: more cost arithmetic, fewer cost passes over the sums."""


@dataclass(frozen=True, kw_only=True)
class Maps:
    """The features of queries and of keys."""

    query: BlockMap
    key: BlockMap

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of both."""
        return (*self.query.tensors, *self.key.tensors)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """Return the same maps over other tensors."""
        count = len(self.query.tensors)
        query, key = self.query.with_tensors(tensors[:count]), self.key.with_tensors(tensors[count:])
        return replace(self, query=query, key=key)


class Tokens(NamedTuple):
    """What a block is made of, in the dtype of the sums, with nothing left in masked tokens."""

    queries: Tensor  # (b, t r c, d)
    keys: Tensor  # (b, n, d)
    values: Tensor  # (b, n, e + 1): [v, 1]
    log_gain: Tensor | None  # (b, n)
    mask: Tensor | None  # (b, n)
    times: Times
    tiles: int


class State(NamedTuple):
    """The sums of phi(k) [v, 1] over exp(log_scale), per feature."""

    sums: Tensor  # (b, m, e + 1)
    log_scale: Tensor  # (b, m)


class Step(NamedTuple):
    """What a block sees, and leaves behind."""

    seen: Tensor  # (b t, r c, e + 1): numerators and denominators, on any scale per row
    state: State
    dense: bool


class Pulled(NamedTuple):
    """Gradients of one block."""

    queries: Tensor  # (b, t r c, d)
    keys: Tensor  # (b, n, d)
    values: Tensor  # (b, n, e + 1)
    log_gain: Tensor | None  # (b, n)
    log_decay: Tensor | None  # (b, n)
    sums: Tensor  # (b, m, e + 1)
    tensors: tuple[Tensor | None, ...]


class _Keys(NamedTuple):
    """A block's keys as features, before their scale is taken off."""

    rows: Tensor  # (b, n, m): log features, -inf where masked; or features, 0 where masked
    origin: Tensor | None  # (b, 1)
    before: Tensor  # (b, m): the state's log scale, relative to the origin
    scale: Tensor  # (b, m): that of the block, likewise


def take_step(maps: Maps, tokens: Tokens, state: State, causal: Tensor) -> Step:
    """Let a block attend to the state and itself, and join the state.

    `causal` is a lower triangle of ones, of at least c rows.
    """
    keys = _open(maps, tokens, state.log_scale)
    if maps.key.logarithmic and not _fits(keys, tokens.times):
        return _step_halves(keys, tokens, maps.query.rows(tokens.queries), state.sums)
    block, _ = _weigh(maps, tokens, keys, state.sums, causal)
    seen = attend_dense(block)
    sums = absorb_dense(block)  # in place of the state that was just read
    if not maps.key.logarithmic:
        return Step(seen, State(sums, state.log_scale), True)
    return Step(seen, _lower(sums, keys) if tokens.times.fade else _stored(sums, keys), True)


def take_token(maps: Maps, tokens: Tokens, state: State, *, own: bool) -> Step:
    """Let a block of one token join the state, then read it: what attending is where no gradient is wanted.

    It writes into the sums of the state if they are its `own` to use.
    """
    keys, (log_decay, documents) = _open(maps, tokens, state.log_scale), tokens.times
    sums = state.sums if own else state.sums.clone()
    if documents is not None:
        stays = documents[:, :1] == documents[:, 1:]
        keys = keys._replace(before=keys.before.masked_fill(~stays, EMPTY))
        sums = sums.mul_(stays[..., None])
    if not maps.key.logarithmic:
        sums = sums if log_decay is None else sums.mul_(log_decay.exp()[..., None])
        seen = torch.bmm(maps.query.rows(tokens.queries), sums.addcmul_(keys.rows.mT, tokens.values))
        return Step(seen, State(sums, state.log_scale), True)
    before = keys.before if log_decay is None else keys.before + log_decay
    keys = keys._replace(scale=_round(torch.maximum(before, keys.rows[:, 0]), keys.origin))
    sums.mul_((before - keys.scale).exp_()[..., None])
    sums.addcmul_(keys.rows.sub_(keys.scale[:, None]).exp_().mT, tokens.values)
    queries = maps.query.rows(tokens.queries, keys.scale[:, None])
    queries = queries.sub_(queries.amax(dim=-1, keepdim=True)).exp_()
    return Step(torch.bmm(queries, sums), _stored(sums, keys), True)


def pull_step(
    maps: Maps, tokens: Tokens, state: State, step: Step, grad_sums: Tensor, causal: Tensor, *, wanted: bool
) -> Pulled:
    """Compute a block's features anew and pull gradients back through it.

    Args:
        maps: as in the forward.
        tokens: likewise.
        state: before the block.
        step: as it was, but with the gradient at what was seen in the place of that.
        grad_sums: at the sums after the block.
        causal: as in the forward.
        wanted: whether the maps' tensors want gradients.
    """
    keys = _open(maps, tokens, state.log_scale)
    pull = _pull_dense if step.dense else _pull_halves
    found = pull(maps, tokens, keys, state.sums, step, grad_sums, causal)
    grad_queries, grad_keys = (x.reshape(tokens.keys.shape[0], -1, x.shape[-1]) for x in (found.queries, found.keys))
    if tokens.mask is not None and not maps.key.logarithmic:
        grad_keys = grad_keys.masked_fill(~tokens.mask[..., None], 0.0)
    queries, query_tensors = maps.query.pull(tokens.queries, grad_queries, wanted)
    found_keys, key_tensors = maps.key.pull(tokens.keys, grad_keys, wanted)
    return Pulled(
        queries=queries,
        keys=found_keys,
        values=found.values.reshape(tokens.values.shape),
        log_gain=None if tokens.log_gain is None else grad_keys.sum(dim=-1),
        log_decay=None if found.log_decay is None else found.log_decay.reshape(tokens.keys.shape[:2]),
        sums=found.sums,
        tensors=(*query_tensors, *key_tensors),
    )


def _open(maps: Maps, tokens: Tokens, log_scale: Tensor) -> _Keys:
    """Map a block's keys to features."""
    hidden = None if tokens.mask is None else ~tokens.mask[..., None]
    if not maps.key.logarithmic:
        rows = maps.key.rows(tokens.keys)
        return _Keys(rows if hidden is None else rows.masked_fill(hidden, 0.0), None, log_scale, log_scale)
    gain = maps.key.gain(tokens.keys)
    if tokens.log_gain is not None:
        gain = tokens.log_gain if gain is None else gain + tokens.log_gain
    origin, before, shift = None, log_scale, None
    if gain is not None:
        origin = gain.amax(dim=-1, keepdim=True).to(log_scale.dtype)
        before, shift = log_scale - origin, (gain - origin).to(log_scale.dtype)[..., None]
    rows = maps.key.rows(tokens.keys, shift)
    rows = rows if hidden is None else rows.masked_fill(hidden, -torch.inf)
    return _Keys(rows, origin, before, _round(torch.maximum(before, rows.amax(dim=1)), origin))


def _round(scale: Tensor, origin: Tensor | None) -> Tensor:
    """Round a scale so that it can be stored without its origin."""
    return scale if origin is None else (scale + origin) - origin


def _absolute(scale: Tensor, keys: _Keys) -> Tensor:
    return scale if keys.origin is None else scale + keys.origin


def _stored(sums: Tensor, keys: _Keys) -> State:
    return State(sums, _absolute(keys.scale, keys))


def _lower(sums: Tensor, keys: _Keys) -> State:
    """Put sums that faded on the scale at which each feature's mass is about one."""
    mass = sums[..., -1]
    empty = mass == 0
    lower = _round(keys.scale + mass.masked_fill(empty, 1.0).log(), keys.origin)
    stored = _absolute(lower, keys).masked_fill(empty, EMPTY)
    return State(sums.mul_((keys.scale - lower).exp_()[..., None]), stored)


def _fits(keys: _Keys, times: Times) -> bool:
    """Tell whether a block can be put on one scale; where a look would make the host wait, it is said not to."""
    return keys.rows.device.type == "cpu" and fits_one_scale(keys.rows, keys.before, keys.scale, times)


def _weigh(maps: Maps, tokens: Tokens, keys: _Keys, sums: Tensor, causal: Tensor) -> tuple[Weighing, Tensor | None]:
    """Score a block on one scale, using up its rows; also return what the state was multiplied by, `(b, m, 1)`."""
    features, factor = keys.rows, None
    if maps.key.logarithmic:
        queries = maps.query.rows(tokens.queries, keys.scale[:, None])
        queries = queries.sub_(queries.amax(dim=-1, keepdim=True)).exp_()
        features = features.sub_(keys.scale[:, None]).exp_()
        factor = (keys.before - keys.scale).exp_()[..., None]
        sums = sums * factor
    else:
        queries, sums = maps.query.rows(tokens.queries), sums.clone()
    values = tokens.values
    if tokens.tiles > 1:
        queries, features, values = (
            x.unflatten(1, (tokens.tiles, -1)).flatten(0, 1) for x in (queries, features, values)
        )
    c = features.shape[1]
    return weigh(queries, features, values, sums, fading(tokens.times.tiles(tokens.tiles), causal[:c, :c])), factor


def _pull_dense(
    maps: Maps, tokens: Tokens, keys: _Keys, sums: Tensor, step: Step, grad_sums: Tensor, causal: Tensor
) -> Gradients:
    if maps.key.logarithmic and tokens.times.fade:
        after = step.state.log_scale
        lower = after if keys.origin is None else after - keys.origin
        grown = (keys.scale - lower).masked_fill(after == EMPTY, 0.0).exp_()
        grad_sums = grad_sums * grown[..., None]
    block, shrink = _weigh(maps, tokens, keys, sums, causal)
    found = pull_dense(block, step.seen, grad_sums, decays=tokens.times.log_decay is not None)
    if shrink is None:
        return found
    found.queries.mul_(block.queries)
    found.keys.mul_(block.keys)
    return found._replace(sums=found.sums * shrink)


def _step_halves(keys: _Keys, tokens: Tokens, queries: Tensor, sums: Tensor) -> Step:
    n, t = tokens.keys.shape[1], tokens.tiles
    queries = rearrange(queries, "b (t r c) m -> b r (t c) m", t=t, c=n // t)
    block = Block(queries, keys.rows, tokens.values, tokens.times)
    found = attend_halves(block, sums, keys.before)
    rows, sums, before = fade_to_end(block, sums, keys.before)
    keys = keys._replace(scale=_round(torch.maximum(before, rows.detach().amax(dim=1)), keys.origin))
    weights = (rows - keys.scale[:, None]).exp()
    sums = torch.baddbmm((before - keys.scale).exp()[..., None] * sums, weights.mT, tokens.values)
    return Step(rearrange(found.weighted, "b r (t c) e -> (b t) (r c) e", t=t), _stored(sums, keys), False)


def _pull_halves(
    maps: Maps, tokens: Tokens, keys: _Keys, sums: Tensor, step: Step, grad_sums: Tensor, causal: Tensor
) -> Gradients:
    del causal
    log_decay = tokens.times.log_decay
    inputs = (maps.query.rows(tokens.queries), keys.rows, tokens.values, sums)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (*inputs, *(() if log_decay is None else (log_decay,)))]
        queries, rows, values, sums = leaves[:4]
        if log_decay is not None:
            tokens = tokens._replace(times=tokens.times._replace(log_decay=leaves[4]))
        again = _step_halves(keys._replace(rows=rows), tokens._replace(values=values), queries, sums)
        found = torch.autograd.grad([again.seen, again.state.sums], leaves, [step.seen, grad_sums])
    return Gradients(found[0], found[1], found[2], found[3], found[4] if log_decay is not None else None)
