"""Softmax over the last `window` keys, and the first ones, as a backend, whose decoding state is those keys.

Letters: `b` batch, `h` heads, `g` key heads, `n` new tokens, `w` window, `s` sinks, `d` head width, `e` value width.
"""

from typing import NamedTuple, Unpack

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.attention.base import NO_BETA, Attention, Sizes
from performer_lm.ops.checks import check_batch, check_per_key
from performer_lm.ops.local import attend_to_window, kept_last, local_attention, take_tokens
from performer_lm.ops.softmax import exact_attention
from performer_lm.ranges import Count, Whole, ranged


class LocalCache(NamedTuple):
    """The first `sinks` kept keys, as far as they left the window, and the last `window - 1`, end-aligned.

    Places of neither are masked: sinks to come, and the front of a window that is not full. The decays of dropped keys
    are added to the one after them.
    """

    k: Tensor  # (b g s+w-1 d)
    v: Tensor  # (b g s+w-1 e)
    mask: Tensor  # (b s+w-1) bool
    log_decay: Tensor | None  # (b g s+w-1); None until a token comes with one: undecayed


@ranged
class LocalAttention(Attention[LocalCache]):
    """Softmax over the keys less than `window` tokens back (bidirectional: away) and the first ones, in O(n window).

    Args:
        window: how many keys a token sees, itself among them; bidirectional, that many on each side.
        sinks: how many of the first keys stay in sight (StreamingLLM, 2309.17453). A pretrained softmax model leans on
            its first token, and a window alone takes it away.
        sizes: those of `Attention`.

    Raises:
        ValueError: for sinks beside a window of one token.
    """

    attends_across = False  # a window needs one order of queries and keys

    def __init__(self, *, window: Count, sinks: Whole = 0, **sizes: Unpack[Sizes]) -> None:
        super().__init__(**sizes)
        if sinks and window == 1:
            raise ValueError(f"sinks ({sinks}) need a window of at least 2 tokens, got 1")
        self.window, self.sinks = window, sinks

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
        """Attend over a whole sequence, each query within the window and to the sinks; see `Attention.forward`."""
        if beta is not None:
            raise ValueError(NO_BETA)
        return local_attention(
            q,
            k,
            v,
            window=self.window,
            sinks=self.sinks,
            causal=causal,
            key_mask=mask,
            segments=segments,
            log_decay=log_decay,
        )

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count the blocks of `window` keys that a query meets, two in causal use, else three, and the sinks."""
        seen = min(keys, (2 if causal else 3) * self.window + self.sinks)
        return 2 * self.heads * queries * seen * (self.dim_head + self.dim_value)

    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> LocalCache:
        """Return a state of masked keys; a state never grows, so `max_len` does not matter."""
        held = self.sinks + self.window - 1
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
        """Attend to the held keys and the new ones, and hold the sinks and the last `window - 1` kept of both."""
        if beta is not None:
            raise ValueError(NO_BETA)
        seen = self._append(state, k, v, mask, log_decay)
        if mask is None and k.shape[2] == 1:
            out = attend_to_window(q, seen.k, seen.v, key_mask=seen.mask, log_decay=seen.log_decay)
            return out, self._slide(seen)
        out = local_attention(
            q,
            seen.k,
            seen.v,
            window=self.window,
            sinks=self.sinks,
            causal=True,
            key_mask=seen.mask,
            log_decay=seen.log_decay,
        )
        return out, self._hold(seen)

    def absorb(self, k: Tensor, v: Tensor, state: LocalCache, *, mask: Tensor | None = None) -> LocalCache:
        """Hold the sinks and the last `window - 1` kept of the held keys and the new ones."""
        return self._hold(self._append(state, k, v, mask, None))

    def read(self, q: Tensor, state: LocalCache) -> Tensor:
        """Attend to the held keys, every query standing at the last of them."""
        alone = rearrange(q, "b h i d -> b (h i) 1 d")
        out = exact_attention(alone, state.k, state.v, causal=True, key_mask=state.mask, log_decay=state.log_decay)
        return rearrange(out, "b (h i) 1 e -> b h i e", h=self.heads)

    def _slide(self, seen: LocalCache) -> LocalCache:
        """Drop the oldest key of the window, or keep it as the next sink."""
        if not self.sinks:
            decay = None if seen.log_decay is None else seen.log_decay[..., 1:].clone()
            return LocalCache(seen.k[:, :, 1:].clone(), seen.v[:, :, 1:].clone(), seen.mask[:, 1:].clone(), decay)
        places = torch.arange(seen.mask.shape[1], device=seen.mask.device)
        filled = seen.mask[:, : self.sinks].sum(1, keepdim=True)
        sinks = torch.where(places[: self.sinks] == filled, self.sinks, places[: self.sinks])
        last = torch.cat((sinks, places[self.sinks + 1 :].expand(filled.shape[0], -1)), dim=1)
        decay = seen.log_decay
        if decay is not None:
            lost = decay[..., self.sinks].where(filled == self.sinks, 0.0)
            decay = take_tokens(decay, last)
            decay[..., self.sinks] += lost
        return LocalCache(take_tokens(seen.k, last), take_tokens(seen.v, last), take_tokens(seen.mask, last), decay)

    def _hold(self, seen: LocalCache) -> LocalCache:
        """Keep the keys that the next query may see."""
        length = seen.mask.shape[-1]
        order, start = kept_last(seen.mask), length - (self.window - 1)
        first = length - seen.mask.sum(-1, keepdim=True)  # of the kept ones, in this order
        places = torch.arange(length, device=seen.mask.device)
        sinks = first + places[: self.sinks]
        mask = sinks < start
        last = torch.cat((order.gather(1, sinks.clamp(max=length - 1)), order[..., start:]), dim=1)
        mask = torch.cat((mask, take_tokens(seen.mask, order[..., start:])), dim=1)
        decay = seen.log_decay
        if decay is not None:
            dropped = (places >= first + self.sinks) & (places < start)
            lost = take_tokens(decay, order).masked_fill(~dropped[:, None], 0.0).sum(-1)
            decay = take_tokens(decay, last).masked_fill(~mask[:, None], 0.0)
            if self.sinks:
                decay[..., self.sinks] += lost
        return LocalCache(take_tokens(seen.k, last), take_tokens(seen.v, last), mask, decay)

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
