"""FlashAttention written out in PyTorch, as a backend: the readable one, on any device."""

from torch import Tensor

from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.ops.flash import tile_sizes, tiled_attention
from performer_lm.ranges import Count, Share, ranged


@ranged
class FlashTiledAttention(CachedAttention):
    """Softmax attention in O(n) memory, tile by tile."""

    drops_weights = True

    def __init__(
        self,
        *,
        heads: int,
        key_heads: int,
        dim_head: int,
        dim_value: int,
        layer: int,
        on_chip: Count,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__(
            heads=heads, key_heads=key_heads, dim_head=dim_head, dim_value=dim_value, layer=layer, dropout=dropout
        )
        tile_sizes(on_chip, dim_head)  # refuse a wrong size here, not at the first batch
        self.on_chip = on_chip

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
        return tiled_attention(
            q,
            k,
            v,
            causal=causal,
            key_mask=mask,
            segments=segments,
            log_decay=log_decay,
            on_chip=self.on_chip,
            **self.draw_dropout(),
        )
