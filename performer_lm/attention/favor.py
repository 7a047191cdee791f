"""FAVOR+: softmax attention estimated by random features, in linear time and with a state of fixed size.

Letters: `b` batch, `h` heads, `g` key heads, `i` queries, `j` keys, `n` tokens, `d` head width, `e` value width,
`m` features.
"""

from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from performer_lm.attention.base import NO_BETA, Attention, Sizes, attend_at_end
from performer_lm.attention.feature_maps import AttentionFeatures, SoftmaxFeatures
from performer_lm.ops.checks import check_per_key
from performer_lm.ops.linear import (
    LinearState,
    absorb_keys,
    bidirectional_linear_attention,
    causal_linear_attention,
    empty_state,
    read_state,
)
from performer_lm.ops.linear.state import CPU_TILE
from performer_lm.ops.linear.triton import Kernel, refuse_device, refuse_features, runs_on
from performer_lm.ops.maps import BlockMap
from performer_lm.ranges import Count, Whole, ranged


@ranged
class FavorAttention(Attention[LinearState]):
    """Attention by the products of m features per key head: softmax's by random features, or another kernel's.

    Training, prefill and decoding run one causal engine on one state of m (e + 1) sums and m scales per key head,
    whatever the length (Performers, 2009.14794; the running scale is our own). Later keys never move earlier outputs,
    no epsilon is added, sums are float32.

    Args:
        features: factory of the feature map (`feature_maps.py`, `kernel_maps.py`).
        num_features: `m`; None lets the map choose, for random features d ln d.
        seed: of the projections.
        redraw_interval: optimizer steps between new projections; None never redraws.
        redraw_until: last step at which they may be redrawn; None sets no end.
        chunk_size: tokens per block, which trades speed and memory, never the result; None for as many as caches hold.
        kernel: `torch`, `triton`, or `auto`, which takes Triton's on CUDA where they agree with torch's. A model of
            `triton` opened on another device runs there as one of `auto`.
        sizes: those of `Attention`; the projections of two layers differ.
    """

    def __init__(
        self,
        *,
        features: Callable[..., AttentionFeatures],
        num_features: Count | None,
        seed: int,
        redraw_interval: Count | None,
        redraw_until: Whole | None,
        chunk_size: Count | None,
        kernel: Kernel = "auto",
        **sizes: Unpack[Sizes],
    ) -> None:
        super().__init__(**sizes)
        self.chunk_size, self.kernel = chunk_size, kernel
        self.redraw_interval, self.redraw_until = redraw_interval, redraw_until
        self.features = features(
            heads=self.heads,
            key_heads=self.key_heads,
            dim_head=self.dim_head,
            num_features=num_features,
            layer=self.layer,
            seed=seed,
        )
        if kernel == "triton":
            refusal = refuse_features(*self.features.maps(), max(self.dim_head, self.dim_value))
            if refusal:
                raise ValueError(f"kernel=triton {refusal}: take kernel=auto")
        if redraw_interval is not None and not self.features.redrawn:
            raise ValueError(
                f"redraw_interval ({redraw_interval}) needs projections that are drawn and not trained, and "
                f"attn/features={self.features.choice} has none: set it to null, or take attn/features=positive"
            )

    @property
    def choice(self) -> str:
        """Return the name in `attn=` of the backend that has these features."""
        return self.features.backend

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
        if beta is not None:
            raise ValueError(NO_BETA)
        mask = check_per_key(k, mask=mask, segments=segments, log_decay=log_decay)
        if self.training and self.features.observes:
            self.features.observe(q, k, mask)
        state = self.init_state(k.shape[0], max_len=k.shape[-2], device=k.device, dtype=k.dtype)
        if causal:
            if q.shape[-2] == k.shape[-2]:
                return self._append(q, k, v, state, mask, segments, log_decay)[0]
            return attend_at_end(lambda q: self._append(q, k, v, state, mask, segments, log_decay)[0], q, k.shape[-2])
        if log_decay is not None:
            raise ValueError("log_decay needs causal attention: without an order keys have no age")
        if segments is None:
            return self.read(q, self.absorb(k, v, state, mask=mask))
        query_map, key_map = self._block_maps()
        q, k, log_gain = self.features.prepare(q, k)
        return bidirectional_linear_attention(
            q,
            k,
            v,
            segments,
            query_map=query_map,
            key_map=key_map,
            chunk_size=self.chunk_size,
            mask=mask,
            log_gain=log_gain,
            kernel=self._kernel_for(q),
        )

    def _append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LinearState,
        mask: Tensor | None,
        segments: Tensor | None,
        log_decay: Tensor | None,
    ) -> tuple[Tensor, LinearState]:
        query_map, key_map = self._block_maps()
        q, k, log_gain = self.features.prepare(q, k)
        return causal_linear_attention(
            q,
            k,
            v,
            state,
            query_map=query_map,
            key_map=key_map,
            chunk_size=self.chunk_size,
            mask=mask,
            segments=segments,
            log_decay=log_decay,
            log_gain=log_gain,
            kernel=self._kernel_for(q),
            consume=True,  # forward made the state itself, and extend may use it up
        )

    def check_kernel(self, device: torch.device) -> None:
        """Refuse kernels that were asked for and do not run on a device.

        Raises:
            ValueError: naming the device, and what it needs.
        """
        if self.kernel == "triton" and not runs_on(device.type):
            raise ValueError(f"kernel=triton {refuse_device(device.type)}: take kernel=auto")

    def _kernel_for(self, x: Tensor) -> Kernel:
        """Return the kernel asked for, where it runs."""
        return "auto" if self.kernel == "triton" and not runs_on(x.device.type) else self.kernel

    def check(self, *, causal: bool, packed: bool) -> None:
        """Refuse signed features for causal use and packed documents."""
        if causal or packed:
            self._block_maps()

    def _block_maps(self) -> tuple[BlockMap, BlockMap]:
        """Return the maps that causal use and segments need.

        Raises:
            ValueError: if weights may be negative: a denominator over few keys could vanish.
        """
        query_map, key_map = self.features.maps()
        if self.features.signed or not (isinstance(query_map, BlockMap) and isinstance(key_map, BlockMap)):
            raise ValueError(
                f"attn/features={self.features.choice} gives signed features, for causal=False without segments only: "
                "attn/features=positive takes both"
            )
        return query_map, key_map

    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> LinearState:
        """Return the decoding state before any token; `max_len` does not change the size."""
        return empty_state(
            batch, self.key_heads, self.features.num_features, self.dim_value, device=device, dtype=dtype
        )

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LinearState,
        *,
        mask: Tensor | None = None,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, LinearState]:
        """Append n tokens causally; see `Attention.extend`."""
        if beta is not None:
            raise ValueError(NO_BETA)
        return self._append(q, k, v, state, mask, None, log_decay)

    def absorb(self, k: Tensor, v: Tensor, state: LinearState, *, mask: Tensor | None = None) -> LinearState:
        """Add keys and values to the sums of the state."""
        nothing = k.new_zeros(k.shape[0], self.heads, 0, self.dim_head)
        _, k, log_gain = self.features.prepare(nothing, k)
        key_map = self.features.maps()[1]
        return absorb_keys(k, v, state, key_map=key_map, chunk_size=self.chunk_size, mask=mask, log_gain=log_gain)

    def read(self, q: Tensor, state: LinearState) -> Tensor:
        """Attend from queries `(b, h, i, d)` to all keys of the state."""
        nothing = q.new_zeros(q.shape[0], self.key_heads, 0, self.dim_head)
        q, _, _ = self.features.prepare(q, nothing)
        return read_state(q, state, query_map=self.features.maps()[0], chunk_size=self.chunk_size)

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count features, sums over keys, products with these sums and, causal, the scores within a tile."""
        m, tile = self.features.num_features, min(self.chunk_size or CPU_TILE, CPU_TILE)
        features = m * self.dim_head * (self.heads * queries + self.key_heads * keys)
        sums = m * (self.dim_value + 1) * (self.heads * queries + self.key_heads * keys)
        scores = self.heads * queries * tile * (m + self.dim_value + 1) if causal else 0
        return 2 * (features + sums + scores)

    def redraw(self, step: int) -> None:
        """Set the projections to those of optimizer step `step`: redraw index step // interval, up to the last step."""
        if self.redraw_interval is not None:
            last = step if self.redraw_until is None else min(step, self.redraw_until)
            self.features.redraw(last // self.redraw_interval)


class Redrawable(nn.Module):
    """A module that may hold FAVOR backends, whose features change between optimizer steps only."""

    def settle(self) -> None:
        """Move the running averages of all features by the batches observed since the last call."""
        for attention in self._favor():
            attention.features.settle()

    def redraw(self, step: int) -> None:
        """Set every random projection to that of optimizer step `step`."""
        for attention in self._favor():
            attention.redraw(step)

    def fix_projections(self) -> None:
        """Fix every random projection: no later `redraw` changes one, in this process or from a checkpoint."""
        for attention in self._favor():
            attention.features.fixed = True

    def _favor(self) -> list[FavorAttention]:
        return [module for module in self.modules() if isinstance(module, FavorAttention)]


def favor(*, num_features: int | None, seed: int) -> partial[FavorAttention]:
    """Return the factory of plain FAVOR+ (2009.14794): softmax by positive orthogonal features, drawn once.

    This is the backend that `attn=favor` builds; `partial(favor(...), chunk_size=128)` changes an option of it.

    Args:
        num_features: `m`, per key head; None for d ln d.
        seed: of the projections.
    """
    features = partial(
        SoftmaxFeatures,
        coupling="orthogonal",
        regularized=False,
        antithetic=False,
        learned=False,
        centred=False,
        momentum=None,
    )
    return partial(
        FavorAttention,
        features=features,
        num_features=num_features,
        seed=seed,
        redraw_interval=None,
        redraw_until=None,
        chunk_size=None,
        kernel="auto",
    )
