"""Split the heads of a layer: the first run the global backend, the last see a local window.

Letters: as in `base.py`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from performer_lm.attention.base import Attention, AttentionFactory
from performer_lm.ops.checks import check_log_decay


class SplitState(NamedTuple):
    """The decoding states of both groups of heads."""

    everywhere: Any
    nearby: Any


class SplitAttention(Attention[SplitState]):
    """Give the first `heads - local_heads` heads to `attn` and the last `local_heads` to `local`.

    Args:
        attn: factory of the global heads' backend.
        local: factory of the local heads' backend.
        local_heads: how many of the heads are local; together with their key heads they must split evenly.
    """

    def __init__(
        self,
        *,
        heads: int,
        key_heads: int,
        dim_head: int,
        dim_value: int,
        layer: int,
        attn: AttentionFactory,
        local: AttentionFactory,
        local_heads: int,
    ) -> None:
        super().__init__(heads=heads, key_heads=key_heads, dim_head=dim_head, dim_value=dim_value, layer=layer)
        if not 0 < local_heads < heads:
            raise ValueError(f"local_heads must be within 1..{heads - 1} to split {heads} heads, got {local_heads}")
        group = heads // key_heads
        if local_heads % group:
            raise ValueError(f"local_heads ({local_heads}) must be a multiple of heads per key head ({group})")
        local_keys = local_heads // group
        self.heads_each = [heads - local_heads, local_heads]
        self.keys_each = [key_heads - local_keys, local_keys]
        sizes = {"dim_head": dim_head, "dim_value": dim_value, "layer": layer}
        self.everywhere = attn(heads=self.heads_each[0], key_heads=self.keys_each[0], **sizes)
        self.nearby = local(heads=self.heads_each[1], key_heads=self.keys_each[1], **sizes)
        self.attends_across = self.everywhere.attends_across and self.nearby.attends_across

    def check(self, *, causal: bool, packed: bool) -> None:
        """Refuse what either group cannot keep."""
        self.everywhere.check(causal=causal, packed=packed)
        self.nearby.check(causal=causal, packed=packed)

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
        """Attend with both groups and join their outputs along the heads."""
        first, last = self._split(q, k, v, log_decay)
        everywhere = self.everywhere(*first[:3], causal=causal, mask=mask, segments=segments, log_decay=first[3])
        nearby = self.nearby(*last[:3], causal=causal, mask=mask, segments=segments, log_decay=last[3])
        return torch.cat((everywhere, nearby), dim=1)

    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> SplitState:
        """Return both groups' states before any token."""
        return SplitState(
            self.everywhere.init_state(batch, max_len=max_len, device=device, dtype=dtype),
            self.nearby.init_state(batch, max_len=max_len, device=device, dtype=dtype),
        )

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: SplitState,
        *,
        mask: Tensor | None = None,
        log_decay: Tensor | None = None,
    ) -> tuple[Tensor, SplitState]:
        """Append n tokens to both groups."""
        first, last = self._split(q, k, v, log_decay)
        everywhere, global_state = self.everywhere.extend(*first[:3], state.everywhere, mask=mask, log_decay=first[3])
        nearby, local_state = self.nearby.extend(*last[:3], state.nearby, mask=mask, log_decay=last[3])
        return torch.cat((everywhere, nearby), dim=1), SplitState(global_state, local_state)

    def absorb(self, k: Tensor, v: Tensor, state: SplitState, *, mask: Tensor | None = None) -> SplitState:
        """Append keys to both groups."""
        (k_first, k_last), (v_first, v_last) = k.split(self.keys_each, dim=1), v.split(self.keys_each, dim=1)
        return SplitState(
            self.everywhere.absorb(k_first, v_first, state.everywhere, mask=mask),
            self.nearby.absorb(k_last, v_last, state.nearby, mask=mask),
        )

    def read(self, q: Tensor, state: SplitState) -> Tensor:
        """Attend from q to what both states hold."""
        first, last = q.split(self.heads_each, dim=1)
        return torch.cat((self.everywhere.read(first, state.everywhere), self.nearby.read(last, state.nearby)), dim=1)

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count both groups."""
        return sum(group.count_flops(queries, keys, causal=causal) for group in (self.everywhere, self.nearby))

    def redraw(self, step: int) -> None:
        """Redraw the global heads' projections."""
        self.everywhere.redraw(step)

    def fix_projections(self) -> None:
        """Keep the global heads' projections."""
        self.everywhere.fix_projections()

    def _split(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        check_log_decay(log_decay, k.shape[:-1])
        q_first, q_last = q.split(self.heads_each, dim=1)
        k_first, k_last = k.split(self.keys_each, dim=1)
        v_first, v_last = v.split(self.keys_each, dim=1)
        decay_first, decay_last = (None, None) if log_decay is None else log_decay.split(self.keys_each, dim=1)
        return (q_first, k_first, v_first, decay_first), (q_last, k_last, v_last, decay_last)
