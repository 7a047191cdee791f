"""Softmax attention in chunks (Rabe & Staats), as a backend."""

from functools import partial
from typing import Unpack

from performer_lm.attention.base import Sizes
from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.ops.chunked import chunked_attention
from performer_lm.ranges import Count, ranged


@ranged
class ChunkedAttention(CachedAttention):
    """Softmax attention in O(sqrt n) memory beyond inputs and outputs, on any device.

    Args:
        query_chunk_size: queries worked on together; None for as many as keep a block of scores in cache.
        key_chunk_size: keys worked on together; None for about 4 sqrt(n).
        sizes: those of `Attention`.
    """

    drops_weights = True

    def __init__(
        self, *, query_chunk_size: Count | None = None, key_chunk_size: Count | None = None, **sizes: Unpack[Sizes]
    ) -> None:
        super().__init__(**sizes)
        self.op = partial(chunked_attention, query_chunk_size=query_chunk_size, key_chunk_size=key_chunk_size)
