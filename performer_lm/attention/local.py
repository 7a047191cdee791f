"""Softmax over the last `window` keys as a backend, whose decoding state is the last `window - 1` keys.

Letters: `b` batch, `h` heads, `g` key heads, `n` new tokens, `w` window, `d` head width, `e` value width.
"""

from typing import NamedTuple, Unpack

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.attention.base import NO_BETA, Attention, Sizes
from performer_lm.ops.checks import check_batch, check_per_key
from performer_lm.ops.local import attend_to_window, kept_last, local_attention, take_tokens
from performer_lm.ops.softmax import exact_attention
from performer_lm.ranges import Count, ranged


class LocalCache(NamedTuple):
    """The last `window - 1` kept keys, end-aligned; where there were fewer, the front is masked."""

    k: Tensor  # (b g w-1 d)
    v: Tensor  # (b g w-1 e)
    mask: Tensor  # (b w-1) bool
    log_decay: Tensor | None  # (b g w-1); None until a token comes with one: undecayed


@ranged
class LocalAttention(Attention[LocalCache]):
    """Softmax over the keys less than `window` tokens back (bidirectional: away), in O(n window).

    Args:
        window: how many keys a token sees, itself among them; bidirectional, that many on each side.
        sizes: those of `Attention`.
    """

    attends_across = False  # a window needs one order of queries and keys

    def __init__(self, *, window: Count, **sizes: Unpack[Sizes]) -> None:
        super().__init__(**sizes)
        self.window = window

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
        beta: Tensor | None = None,
    ) -> Tensor:
        """Attend over a whole sequence, each query within the window; see `Attention.forward`."""
        if beta is not None:
            raise ValueError(NO_BETA)
        return local_attention(
            q, k, v, window=self.window, causal=causal, key_mask=mask, segments=segments, log_decay=log_decay
        )

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count the blocks of `window` keys that a query meets: two in causal use, else three."""
        seen = min(keys, (2 if causal else 3) * self.window)
        return 2 * self.heads * queries * seen * (self.dim_head + self.dim_value)

    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> LocalCache:
        """Return a state of masked keys; a state never grows, so `max_len` does not matter."""
        held = self.window - 1
        k = torch.zeros(batch, self.key_heads, held, self.dim_head, device=device, dtype=dtype)
        v = torch.zeros(batch, self.key_heads, held, self.dim_value, device=device, dtype=dtype)
        return LocalCache(k, v, torch.zeros(batch, held, device=device, dtype=torch.bool), None)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LocalCache,
        *,
        mask: Tensor | None = None,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, LocalCache]:
        """Attend to the held keys and the new ones, and hold the last `window - 1` kept of both."""
        if beta is not None:
            raise ValueError(NO_BETA)
        seen = self._append(state, k, v, mask, log_decay)
        if mask is None and k.shape[2] == 1:
            out = attend_to_window(q, seen.k, seen.v, key_mask=seen.mask, log_decay=seen.log_decay)
            decay = None if seen.log_decay is None else seen.log_decay[..., 1:].clone()
            return out, LocalCache(seen.k[:, :, 1:].clone(), seen.v[:, :, 1:].clone(), seen.mask[:, 1:].clone(), decay)
        out = local_attention(
            q, seen.k, seen.v, window=self.window, causal=True, key_mask=seen.mask, log_decay=seen.log_decay
        )
        return out, self._hold(seen)

    def absorb(self, k: Tensor, v: Tensor, state: LocalCache, *, mask: Tensor | None = None) -> LocalCache:
        """Hold the last `window - 1` kept of the held keys and the new ones."""
        return self._hold(self._append(state, k, v, mask, None))

    def read(self, q: Tensor, state: LocalCache) -> Tensor:
        """Attend to the held keys, every query standing at the last of them."""
        alone = rearrange(q, "b h i d -> b (h i) 1 d")
        out = exact_attention(alone, state.k, state.v, causal=True, key_mask=state.mask, log_decay=state.log_decay)
        return rearrange(out, "b (h i) 1 e -> b h i e", h=self.heads)

    def _hold(self, seen: LocalCache) -> LocalCache:
        """Keep the keys that the next query may see."""
        start = seen.mask.shape[-1] - (self.window - 1)
        last = kept_last(seen.mask)[..., start:]
        decay = None if seen.log_decay is None else take_tokens(seen.log_decay, last)
        return LocalCache(take_tokens(seen.k, last), take_tokens(seen.v, last), take_tokens(seen.mask, last), decay)

    @staticmethod
    def _append(state: LocalCache, k: Tensor, v: Tensor, mask: Tensor | None, log_decay: Tensor | None) -> LocalCache:
        """Return held and new tokens together."""
        check_batch(k, state.k)
        mask = check_per_key(k, mask=mask, segments=None, log_decay=log_decay)
        batch, groups, tokens, _ = k.shape
        mask = state.mask.new_ones(batch, tokens) if mask is None else mask
        decay = state.log_decay
        if log_decay is not None or decay is not None:
            dtype = torch.promote_types(k.dtype, torch.float32)
            decay = k.new_zeros(batch, groups, state.mask.shape[-1], dtype=dtype) if decay is None else decay
            log_decay = k.new_zeros(batch, groups, tokens, dtype=dtype) if log_decay is None else log_decay
            decay = torch.cat([decay, log_decay], dim=-1)
        return LocalCache(
            torch.cat([state.k, k.to(state.k.dtype)], dim=2),
            torch.cat([state.v, v.to(state.v.dtype)], dim=2),
            torch.cat([state.mask, mask], dim=1),
            decay,
        )
