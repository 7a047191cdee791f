"""The delta rule on unit features: a memory of fixed size whose contents can be corrected.

Letters: as in `base.py`; `m` features.
"""

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from performer_lm.attention.base import Attention, Sizes, attend_at_end
from performer_lm.attention.feature_maps import AttentionFeatures
from performer_lm.attention.kernel_maps import IdentityFeatures
from performer_lm.ops.checks import check_per_key
from performer_lm.ops.delta import delta_rule, empty_memory
from performer_lm.ops.linear.state import CPU_TILE
from performer_lm.ops.maps import BlockMap, Generalized
from performer_lm.ranges import Count, ranged


@ranged
class DeltaAttention(Attention[Tensor]):
    """Attention by a memory that corrects its contents instead of adding to them (2102.11174, 2412.06464).

    A token corrects the share `beta` of the error that the memory `(m, e)` makes at its key, and reads the memory at
    its query. Features are those of FAVOR+ scaled to length one; `identity` is q and k themselves at length one, which
    is gated DeltaNet. Causal only.

    Args:
        features: factory of the feature map (`feature_maps.py`, `kernel_maps.py`).
        num_features: `m`; None lets the map choose.
        seed: of the projections.
        chunk_size: tokens per block, which trades speed and memory, never the result; None for as many as caches hold.
        sizes: those of `Attention`.
    """

    attends_across = False
    takes_beta = True

    def __init__(
        self,
        *,
        features: Callable[..., AttentionFeatures],
        num_features: Count | None,
        seed: int,
        chunk_size: Count | None,
        **sizes: Unpack[Sizes],
    ) -> None:
        super().__init__(**sizes)
        self.chunk_size = chunk_size
        self.features = features(
            heads=self.heads,
            key_heads=self.key_heads,
            dim_head=self.dim_head,
            num_features=num_features,
            layer=self.layer,
            seed=seed,
        )
        if self.features.observes:
            raise ValueError(
                "attn=delta keeps no running averages, which attn=favor does: take that, or attn/features=positive, "
                "hyperbolic or learned"
            )
        self._maps()

    def _maps(self) -> tuple[BlockMap, BlockMap]:
        """Return the maps of queries and keys, whose features the memory scales to length one."""
        if isinstance(self.features, IdentityFeatures):
            return (Generalized((), activation="identity"),) * 2
        query_map, key_map = self.features.maps()
        if not (isinstance(query_map, BlockMap) and isinstance(key_map, BlockMap)):
            raise ValueError(
                f"attn=delta takes no attn/features={self.features.choice}: take attn=favor, or attn/features="
                "positive, hyperbolic, learned, generalized or identity"
            )
        return query_map, key_map

    def check(self, *, causal: bool, packed: bool) -> None:
        """Refuse use without an order: a memory is corrected by one token after the other."""
        if not causal:
            raise ValueError("attn=delta is causal only; attn=favor, exact, chunked and flash attend both ways")

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
        """Attend over a whole sequence, see `Attention.forward`."""
        mask = check_per_key(k, mask=mask, segments=segments, log_decay=log_decay)
        self.check(causal=causal, packed=segments is not None)
        memory = self.init_state(k.shape[0], max_len=k.shape[-2], device=k.device, dtype=k.dtype)
        if q.shape[-2] == k.shape[-2]:
            return self._append(q, k, v, memory, mask, segments, log_decay, beta)[0]
        return attend_at_end(
            lambda q: self._append(q, k, v, memory, mask, segments, log_decay, beta)[0], q, k.shape[-2]
        )

    def _append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        segments: Tensor | None,
        log_decay: Tensor | None,
        beta: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        query_map, key_map = self._maps()
        q, k, _ = self.features.prepare(q, k)
        return delta_rule(
            q,
            k,
            v,
            k.new_ones(k.shape[:3]) if beta is None else beta,
            memory,
            query_map=query_map,
            key_map=key_map,
            chunk_size=self.chunk_size,
            mask=mask,
            segments=segments,
            log_decay=log_decay,
            consume=True,  # forward made the memory itself, and extend may use it up
        )

    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the memory before any token; `max_len` does not change the size."""
        return empty_memory(
            batch, self.key_heads, self.features.num_features, self.dim_value, device=device, dtype=dtype
        )

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor,
        *,
        mask: Tensor | None = None,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append n tokens causally; see `Attention.extend`."""
        return self._append(q, k, v, state, mask, None, log_decay, beta)

    def absorb(self, k: Tensor, v: Tensor, state: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Write keys and values whole into the memory."""
        nothing = k.new_zeros(k.shape[0], self.heads, k.shape[2], self.dim_head)
        return self._append(nothing, k, v, state, mask, None, None, None)[1]

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        """Read the memory at queries `(b, h, i, d)`, adding nothing."""
        b, _, i, _ = q.shape
        k, v = q.new_zeros(b, self.key_heads, i, self.dim_head), q.new_zeros(b, self.key_heads, i, self.dim_value)
        return self._append(q, k, v, state, None, None, None, k.new_zeros(k.shape[:3]))[0]

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count features, the memory's products and, within a tile, scores, overlaps, their inverse and errors."""
        m, e, tile = self.features.num_features, self.dim_value, min(self.chunk_size or CPU_TILE, CPU_TILE)
        asked, written = self.heads * queries, self.key_heads * keys
        features = m * self.dim_head * (asked + written)
        memory = m * e * (asked + 2 * written)
        scores = tile * (asked * (m + e) + written * (m + e + tile // 3))
        return 2 * (features + memory + scores)
