"""Texts that a model has read, kept as states: a prompt that begins with one is read from there on."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.attention.base import fork
from performer_lm.attention.joining import count_bytes, join_rows
from performer_lm.generation.decode import Prefix
from performer_lm.performer import PerformerState
from performer_lm.ranges import Whole, ranged


class Held(NamedTuple):
    """The state after a text, and the logits of the next token."""

    logits: Tensor
    state: PerformerState


@ranged
class PrefixStore:
    """States of the texts lately seen, up to `capacity` bytes; the one not used for the longest goes first."""

    def __init__(self, *, capacity: Whole) -> None:
        self.capacity, self.bytes, self.hits, self.misses, self.tokens_spared = capacity, 0, 0, 0, 0
        self._held: OrderedDict[bytes, Held] = OrderedDict()  # by their ids

    def __len__(self) -> int:
        return len(self._held)

    def find(self, ids: Sequence[int]) -> Prefix | None:
        """Return a copy of the longest text held that `ids` begins with."""
        if not self.capacity:
            return None
        wanted = _key(ids)
        found = max((key for key in self._held if wanted.startswith(key)), key=len, default=None)
        if found is None:
            self.misses += 1
            return None
        self._held.move_to_end(found)
        held, count = self._held[found], len(found) // 8
        self.hits, self.tokens_spared = self.hits + 1, self.tokens_spared + count
        tokens = torch.tensor([ids[:count]], device=held.logits.device, dtype=torch.int64)
        return Prefix(tokens, torch.ones_like(tokens, dtype=torch.bool), *fork(held))

    def put(self, ids: Sequence[int], logits: Tensor, state: PerformerState) -> None:
        """Keep a copy of a state of one row, which has read `ids`, and of the logits that follow."""
        key = _key(ids)
        if not self.capacity or key in self._held:
            return
        held = Held(logits.clone(), join_rows([state]))  # without the places that only other rows fill
        if self._size(key, held) > self.capacity:
            return
        self._held[key] = held
        self.bytes += self._size(key, held)
        while self.bytes > self.capacity:
            self.bytes -= self._size(*self._held.popitem(last=False))

    @staticmethod
    def _size(key: bytes, held: Held) -> int:
        return len(key) + count_bytes(held)


def _key(ids: Sequence[int]) -> bytes:
    """Return ids as bytes, eight for each, so that the beginning of a text is the beginning of its key."""
    return array("q", ids).tobytes()
