"""Softmax attention in chunks (Rabe & Staats), as a backend."""

from torch import Tensor

from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.ops.chunked import chunked_attention
from performer_lm.ranges import Count, Share, ranged


@ranged
class ChunkedAttention(CachedAttention):
    """Softmax attention in O(sqrt n) memory beyond inputs and outputs, on any device."""

    drops_weights = True

    def __init__(
        self,
        *,
        heads: int,
        key_heads: int,
        dim_head: int,
        dim_value: int,
        layer: int,
        dropout: Share = 0.0,
        query_chunk_size: Count | None = None,
        key_chunk_size: Count | None = None,
    ) -> None:
        super().__init__(
            heads=heads, key_heads=key_heads, dim_head=dim_head, dim_value=dim_value, layer=layer, dropout=dropout
        )
        self.query_chunk_size = query_chunk_size
        self.key_chunk_size = key_chunk_size

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        log_decay: Tensor | None = None,
    ) -> Tensor:
        """Attend as `Attention.forward` says."""
        return chunked_attention(
            q,
            k,
            v,
            causal=causal,
            key_mask=mask,
            segments=segments,
            log_decay=log_decay,
            query_chunk_size=self.query_chunk_size,
            key_chunk_size=self.key_chunk_size,
            **self.draw_dropout(),
        )
