"""The decoding state of the softmax backends: every key and value so far, preallocated and grown by doubling.

Letters: `b` batch, `g` key heads, `n` new tokens, `d` head width, `e` value width; `cap` is the room, `length` what of
it is filled.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.attention.base import NO_BETA, Attention
from performer_lm.ops.checks import check_batch, check_per_key


class KVCache(NamedTuple):
    """Keys, values and what is known of each; the first `length` places are filled, alike in every row.

    `mask` and `log_decay` are None until a token comes with one: then all tokens before it count as kept and undecayed.
    """

    k: Tensor  # (b g cap d)
    v: Tensor  # (b g cap e)
    mask: Tensor | None  # (b cap) bool
    log_decay: Tensor | None  # (b g cap)
    length: int

    def append(self, k: Tensor, v: Tensor, *, mask: Tensor | None, log_decay: Tensor | None) -> "KVCache":
        """Write n tokens behind the last one, in place where there is room, and return the longer cache."""
        check_batch(k, self.k)
        mask = check_per_key(k, mask=mask, segments=None, log_decay=log_decay)
        length = self.length + k.shape[-2]
        room = max(self.k.shape[-2], 1)
        while room < length:
            room *= 2
        return KVCache(
            k=_write(self.k, k, start=self.length, room=room, dim=2),
            v=_write(self.v, v, start=self.length, room=room, dim=2),
            mask=self._append_mask(mask, new=k, room=room),
            log_decay=self._append_decay(log_decay, new=k, room=room),
            length=length,
        )

    def filled(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return views of the filled part: k, v, mask, log_decay."""
        return (
            self.k[..., : self.length, :],
            self.v[..., : self.length, :],
            None if self.mask is None else self.mask[..., : self.length],
            None if self.log_decay is None else self.log_decay[..., : self.length],
        )

    @staticmethod
    def join(caches: Sequence["KVCache"], *, spare: int = 0) -> "KVCache":
        """Copy the rows of several caches into one, aligned at the last token, with room for `spare` more tokens.

        Places in front that no row keeps are left out: a batch that rows join and leave grows no longer than its rows.
        """
        filled = [cache.filled() for cache in caches]
        lengths = [cache.length - _count_pads(mask) for cache, (_, _, mask, _) in zip(caches, filled, strict=True)]
        longest = max(lengths)

        def gather(parts: list[Tensor], dim: int) -> Tensor:
            shape = [sum(map(len, parts)), *parts[0].shape[1:]]
            shape[dim] = longest + spare
            joined = parts[0].new_zeros(shape)  # a masked value must be a number
            for rows, part, length in zip(joined.split([*map(len, parts)]), parts, lengths, strict=True):
                rows.narrow(dim, longest - length, length).copy_(part.narrow(dim, part.shape[dim] - length, length))
            return joined

        mask = decay = None
        if any(mask is not None for _, _, mask, _ in filled) or min(lengths) < longest:
            masks = [
                k.new_ones(len(k), k.shape[2], dtype=torch.bool) if own is None else own for k, _, own, _ in filled
            ]
            mask = gather(masks, 1)
        if any(decay is not None for _, _, _, decay in filled):
            dtype = torch.promote_types(filled[0][0].dtype, torch.float32)
            decay = gather(
                [k.new_zeros(k.shape[:3], dtype=dtype) if own is None else own for k, _, _, own in filled], 2
            )
        return KVCache(gather([k for k, *_ in filled], 2), gather([v for _, v, *_ in filled], 2), mask, decay, longest)

    def _append_mask(self, mask: Tensor | None, *, new: Tensor, room: int) -> Tensor | None:
        if mask is None and self.mask is None:
            return None
        batch, _, tokens, _ = new.shape
        stored = new.new_ones(batch, self.length, dtype=torch.bool) if self.mask is None else self.mask
        mask = new.new_ones(batch, tokens, dtype=torch.bool) if mask is None else mask
        return _write(stored, mask, start=self.length, room=room, dim=1)

    def _append_decay(self, log_decay: Tensor | None, *, new: Tensor, room: int) -> Tensor | None:
        if log_decay is None and self.log_decay is None:
            return None
        batch, groups, tokens, _ = new.shape
        stored, dtype = self.log_decay, torch.promote_types(new.dtype, torch.float32)
        stored = new.new_zeros(batch, groups, self.length, dtype=dtype) if stored is None else stored
        log_decay = new.new_zeros(batch, groups, tokens, dtype=dtype) if log_decay is None else log_decay
        return _write(stored, log_decay, start=self.length, room=room, dim=2)


def _count_pads(mask: Tensor | None) -> int:
    """Return how many places in front no row of a mask `(b, n)` keeps; looks at the values."""
    return 0 if mask is None or not mask.numel() else int(mask.any(0).int().argmax())


def _write(stored: Tensor, new: Tensor, *, start: int, room: int, dim: int) -> Tensor:
    """Write `new` along `dim` at `start`, into `stored` or into a longer copy of it with `room` places."""
    if stored.shape[dim] < room:
        shape = list(stored.shape)
        shape[dim] = room
        longer = stored.new_empty(shape)
        longer.narrow(dim, 0, start).copy_(stored.narrow(dim, 0, start))
        stored = longer
    stored.narrow(dim, start, new.shape[dim]).copy_(new)
    return stored


class CachedAttention(Attention[KVCache]):
    """A backend that decodes by `forward` over a cache of all keys; a subclass only names the `op`."""

    op: Callable[..., Tensor]
    """The softmax op of `performer_lm.ops` that attends, with the backend's own options."""

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
        """Attend over a whole sequence by `op`; the seed of dropout comes from the CPU's generator."""
        if beta is not None:
            raise ValueError(NO_BETA)
        drops = self.training and self.dropout > 0
        return self.op(
            q,
            k,
            v,
            causal=causal,
            key_mask=mask,
            segments=segments,
            log_decay=log_decay,
            dropout=self.dropout if drops else 0.0,
            seed=int(torch.randint(2**62, (), device="cpu")) if drops else None,
        )

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count scores and weighted sums; causal, without the blocks that lie in the future."""
        seen = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
        return 2 * self.heads * seen * (self.dim_head + self.dim_value)

    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """Return an empty cache with room for `max_len` tokens."""
        k = torch.empty(batch, self.key_heads, max_len, self.dim_head, device=device, dtype=dtype)
        v = torch.empty(batch, self.key_heads, max_len, self.dim_value, device=device, dtype=dtype)
        return KVCache(k, v, mask=None, log_decay=None, length=0)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: KVCache,
        *,
        mask: Tensor | None = None,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Append the keys, then attend causally from the new queries to all that is cached."""
        state = state.append(k, v, mask=mask, log_decay=log_decay)
        keys, values, kept, decay = state.filled()
        return self.forward(q, keys, values, causal=True, mask=kept, log_decay=decay, beta=beta), state

    def absorb(self, k: Tensor, v: Tensor, state: KVCache, *, mask: Tensor | None = None) -> KVCache:
        """Append to the cache."""
        return state.append(k, v, mask=mask, log_decay=None)

    def read(self, q: Tensor, state: KVCache) -> Tensor:
        """Attend to all that is cached; where it decays, every query stands at the last key."""
        keys, values, kept, decay = state.filled()
        if decay is None or not q.shape[2]:
            return self.forward(q, keys, values, causal=False, mask=kept)
        alone = rearrange(q, "b h i d -> b (h i) 1 d")
        out = self.forward(alone, keys, values, causal=True, mask=kept, log_decay=decay)
        return rearrange(out, "b (h i) 1 e -> b h i e", h=self.heads)
