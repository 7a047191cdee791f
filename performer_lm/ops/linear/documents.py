"""Bidirectional linear attention within documents: each token sees its own document, before it and after it.

What stands before a token is found as in causal attention, and what stands after it likewise from the other end; both
in the exact form, since a loud document may lie beside a quiet one. The backward computes blocks anew.

Letters: `b` batch times key heads, `r` queries per key, `n` tokens, `c` tokens of a block, `d` head width, `e` value
width, `m` features.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from performer_lm.ops.linear.block import Maps, State
from performer_lm.ops.linear.fading import Times
from performer_lm.ops.linear.halves import Block, Found, attend_halves, fade_to_end, join


class Packed(NamedTuple):
    """Documents in a row, in the dtype of the sums."""

    queries: Tensor  # (b, r, n, d)
    keys: Tensor  # (b, n, d)
    values: Tensor  # (b, n, e + 1): [v, 1]
    log_gain: Tensor | None  # (b, n): -inf where masked
    documents: Tensor  # (b, 1 + n): the first token's document stands twice

    def part(self, start: int, stop: int) -> "Packed":
        """Cut out some tokens."""
        return Packed(
            self.queries[:, :, start:stop],
            self.keys[:, start:stop],
            self.values[:, start:stop],
            None if self.log_gain is None else self.log_gain[:, start:stop],
            self.documents[:, start : stop + 1],
        )

    def reversed(self) -> "Packed":
        """Turn the row of tokens round."""
        documents = self.documents[:, 1:].flip(1)
        return Packed(
            self.queries.flip(2),
            self.keys.flip(1),
            self.values.flip(1),
            None if self.log_gain is None else self.log_gain.flip(1),
            torch.cat([documents[:, :1], documents], dim=1),
        )


def attend_in_documents(maps: Maps, packed: Packed, empty: State, chunk_size: int) -> Tensor:
    """Attend within documents, from a state of no keys: `(b, r, n, e)`."""
    n = packed.keys.shape[1]
    starts = list(range(0, n, chunk_size))
    around = packed.reversed()
    before = _states(maps, packed, empty, starts)
    after = _states(maps, around, empty, [n - min(start + chunk_size, n) for start in reversed(starts)])[::-1]
    outputs = []
    for start, left, right in zip(starts, before, after, strict=True):
        stop = min(start + chunk_size, n)
        parts = packed.part(start, stop), around.part(n - stop, n - start)
        outputs.append(checkpoint(_see, maps, *parts, left, right, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, dim=2)


def _states(maps: Maps, packed: Packed, state: State, starts: list[int]) -> list[State]:
    """Return the state before each block."""
    states = [state]
    for start, stop in pairwise(starts):
        states.append(
            State(
                *checkpoint(
                    _absorb, maps, packed.part(start, stop), states[-1], use_reentrant=False, preserve_rng_state=False
                )
            )
        )
    return states


def _block(maps: Maps, packed: Packed) -> Block:
    queries, keys = maps.query(packed.queries.flatten(1, 2)).log_scale, maps.key(packed.keys).log_scale
    assert queries is not None
    assert keys is not None
    if packed.log_gain is not None:
        keys = keys + packed.log_gain[..., None]
    queries = queries.unflatten(1, packed.queries.shape[1:3])
    return Block(queries, keys, packed.values, Times(None, packed.documents))


def _absorb(maps: Maps, packed: Packed, state: State) -> tuple[Tensor, Tensor]:
    block = _block(maps, packed)
    keys, sums, before = fade_to_end(block, *state)
    scale = torch.maximum(before, keys.detach().amax(dim=1))
    weights = (keys - scale[:, None]).exp()
    return torch.baddbmm((before - scale).exp()[..., None] * sums, weights.mT, block.values), scale


def _see(maps: Maps, packed: Packed, around: Packed, before: State, after: State) -> Tensor:
    found = attend_halves(_block(maps, packed), *before)
    later = attend_halves(_block(maps, around), *after, own=False)
    seen = join(found, Found(later.peak.flip(2), later.weighted.flip(2))).weighted
    mass = seen[..., -1:]
    return seen[..., :-1] / mass.masked_fill(mass == 0, 1.0)
