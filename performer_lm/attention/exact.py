"""Softmax attention by its n x n matrix, as a backend: the reference that approximations are measured against."""

from torch import Tensor

from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.ops.softmax import exact_attention


class ExactAttention(CachedAttention):
    """Softmax attention in O(n^2) time and memory."""

    drops_weights = True

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count the whole matrix, future and all."""
        del causal
        return super().count_flops(queries, keys, causal=False)

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
        return exact_attention(
            q, k, v, causal=causal, key_mask=mask, segments=segments, log_decay=log_decay, **self.draw_dropout()
        )
