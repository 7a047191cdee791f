"""Softmax attention by its n x n matrix, as a backend: the reference that approximations are measured against."""

from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.ops.softmax import exact_attention


class ExactAttention(CachedAttention):
    """Softmax attention in O(n^2) time and memory."""

    drops_weights = True
    op = staticmethod(exact_attention)

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count the whole matrix, future and all."""
        return super().count_flops(queries, keys, causal=False)
