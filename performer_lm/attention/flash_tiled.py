"""FlashAttention written out in PyTorch, as a backend: the readable one, on any device."""

from functools import partial
from typing import Unpack

from performer_lm.attention.base import Sizes
from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.ops.flash import tile_sizes, tiled_attention
from performer_lm.ranges import Count, ranged


@ranged
class FlashTiledAttention(CachedAttention):
    """Softmax attention in O(n) memory, tile by tile.

    Args:
        on_chip: numbers that fast memory holds, which decides the tiles.
        sizes: those of `Attention`.
    """

    drops_weights = True

    def __init__(self, *, on_chip: Count, **sizes: Unpack[Sizes]) -> None:
        super().__init__(**sizes)
        tile_sizes(on_chip, self.dim_head)  # refuse a wrong size here, not at the first batch
        self.op = partial(tiled_attention, on_chip=on_chip)
