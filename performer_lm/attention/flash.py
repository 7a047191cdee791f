"""Softmax attention by the platform's flash kernel (SDPA), as a backend."""

from torch import Tensor

from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.ops.sdpa import sdpa_attention


class FlashAttention(CachedAttention):
    """Softmax attention in O(n) memory, at the speed of the kernel that PyTorch brings for the device."""

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
        return sdpa_attention(q, k, v, causal=causal, key_mask=mask, segments=segments, log_decay=log_decay)
