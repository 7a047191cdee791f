"""Softmax attention by the platform's flash kernel (SDPA), as a backend."""

from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.ops.sdpa import sdpa_attention


class FlashAttention(CachedAttention):
    """Softmax attention in O(n) memory, at the speed of the kernel that PyTorch brings for the device."""

    op = staticmethod(sdpa_attention)
