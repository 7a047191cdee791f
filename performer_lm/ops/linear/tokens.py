"""The tokens of a block, and their features before they are put on a scale.

Logarithms are in units of log 2 and relative to an origin near them, as float32 is finest near zero.

Letters: `b` batch times key heads, `g` key heads, `r` queries per key, `n` tokens of the block, `d` head width, `e`
value width, `m` features.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from performer_lm.ops.linear.fading import Times
from performer_lm.ops.linear.scratch import Scratch
from performer_lm.ops.linear.state import Rebased, add_gains, rebase
from performer_lm.ops.maps import BlockMap

TILE = 32
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
        return type(self)(query=self.query.with_tensors(tensors[:count]), key=self.key.with_tensors(tensors[count:]))

    @property
    def code(self) -> str:
        """Return all but the tensors as text."""
        return f"{len(self.query.tensors)}|{self.query.code}|{self.key.code}"

    @classmethod
    def decode(cls, code: str, tensors: tuple[Tensor, ...]) -> Self:
        """Return the maps that have this code, over these tensors."""
        count, query, key = code.split("|")
        own, other = tensors[: int(count)], tensors[int(count) :]
        return cls(query=BlockMap.decode(query, own), key=BlockMap.decode(key, other))


class Tokens(NamedTuple):
    """What a block is made of, in the dtype of the sums, with nothing left in masked tokens."""

    queries: Tensor  # (b, n r, d)
    keys: Tensor  # (b, n, d)
    values: Tensor  # (b, n, e + 1): [v, 1]
    log_gain: Tensor | None  # (b, n)
    mask: Tensor | None  # (b, n)
    times: Times
    groups: int  # g

    @property
    def tiles(self) -> int:
        """Return t: a block is whole tiles, or part of one."""
        return max(1, self.keys.shape[1] // TILE)


class State(NamedTuple):
    """The sums of phi(k) [v, 1] over 2^exponent, per feature."""

    sums: Tensor  # (b, m, e + 1)
    exponent: Tensor  # (b, m), float64


class Keys(NamedTuple):
    """A block's keys as features, before a scale is taken off."""

    rows: Tensor  # (b, n, m): log features, -inf where masked; or features, 0 where masked
    base: Rebased  # what they are relative to
    scale: Tensor | None  # (b, 1, m): the largest in sight at the end of the block, likewise; None without logarithms


def flat(x: Tensor, groups: int) -> Tensor:
    """View `(b, n, ...)` as a map takes it: `(g, n, ...)`, with the tokens of the whole batch."""
    return x.reshape(groups, -1, x.shape[-1])


def open_keys(maps: Maps, tokens: Tokens, exponent: Tensor, scratch: Scratch) -> Keys:
    """Map a block's keys to features."""
    x, (b, n, _) = flat(tokens.keys, tokens.groups), tokens.keys.shape
    rows = scratch("keys", b, n, exponent.shape[-1])
    hidden = None if tokens.mask is None else ~tokens.mask[..., None]
    if not maps.key.logarithmic:
        maps.key.write(x, flat(rows, tokens.groups), add=False)
        return Keys(rows if hidden is None else rows.masked_fill_(hidden, 0.0), rebase(None, exponent), None)
    gain = maps.key.gain(x)
    base = rebase(add_gains(None if gain is None else gain.view(b, n), tokens.log_gain), exponent)
    if base.shift is not None:
        rows.copy_(base.shift.expand_as(rows))
    maps.key.write(x, flat(rows, tokens.groups), add=base.shift is not None)
    rows = rows if hidden is None else rows.masked_fill_(hidden, -torch.inf)
    return Keys(rows, base, torch.maximum(base.before.to(rows.dtype), rows.amax(dim=1, keepdim=True)))


def pull_map(
    a_map: BlockMap, x: Tensor, grad: Tensor, groups: int, wanted: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Pull the gradient `(b, n, m)` at features of x `(b, n, d)` back to x and, if `wanted`, the map's tensors."""
    found, tensors = a_map.pull(flat(x, groups), flat(grad, groups), wanted=wanted)
    return found.view_as(x), tensors
