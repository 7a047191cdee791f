"""Split the heads of a layer: the first run the global backend, the last see a local window.

Letters: as in `base.py`.
"""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from performer_lm.attention.base import NO_BETA, Attention, AttentionFactory, Sizes
from performer_lm.ops.checks import check_log_decay

Part = tuple[tuple[Tensor, Tensor, Tensor], Any]
"""The q, k, v of one group of heads, and the log_decay and beta of its keys, where there are any."""


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
        sizes: those of `Attention`.
    """

    def __init__(
        self, *, attn: AttentionFactory, local: AttentionFactory, local_heads: int, **sizes: Unpack[Sizes]
    ) -> None:
        super().__init__(**sizes)
        heads, group = self.heads, self.heads // self.key_heads
        if not 0 < local_heads < heads:
            raise ValueError(f"local_heads must be within 1..{heads - 1} to split {heads} heads, got {local_heads}")
        if local_heads % group:
            raise ValueError(f"local_heads ({local_heads}) must be a multiple of heads per key head ({group})")
        self.heads_each = [heads - local_heads, local_heads]
        self.keys_each = [count // group for count in self.heads_each]
        self.everywhere, self.nearby = (
            factory(**(self.sizes | {"heads": own_heads, "key_heads": own_keys}))
            for factory, own_heads, own_keys in zip((attn, local), self.heads_each, self.keys_each, strict=True)
        )
        self.attends_across = self.everywhere.attends_across and self.nearby.attends_across
        self.takes_beta = self.everywhere.takes_beta or self.nearby.takes_beta

    def check(self, *, causal: bool, packed: bool) -> None:
        """Refuse an order or packed documents that either group cannot handle."""
        self.everywhere.check(causal=causal, packed=packed)
        self.nearby.check(causal=causal, packed=packed)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attend with both groups and join the outputs along the heads."""
        (first, of_first), (last, of_last) = self._split(q, k, v, log_decay, beta)
        everywhere = self.everywhere(*first, **(of_first | options))
        return torch.cat((everywhere, self.nearby(*last, **(of_last | options))), dim=1)

    def init_state(self, batch: int, **options: Any) -> SplitState:
        """Return both groups' states before any token."""
        return SplitState(self.everywhere.init_state(batch, **options), self.nearby.init_state(batch, **options))

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: SplitState,
        *,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, SplitState]:
        """Append n tokens to both groups."""
        (first, of_first), (last, of_last) = self._split(q, k, v, log_decay, beta)
        first_out, everywhere = self.everywhere.extend(*first, state.everywhere, **(of_first | options))
        last_out, nearby = self.nearby.extend(*last, state.nearby, **(of_last | options))
        return torch.cat((first_out, last_out), dim=1), SplitState(everywhere, nearby)

    def absorb(self, k: Tensor, v: Tensor, state: SplitState, *, mask: Tensor | None = None) -> SplitState:
        """Append keys to both groups."""
        first, last = zip(k.split(self.keys_each, dim=1), v.split(self.keys_each, dim=1), strict=True)
        return SplitState(
            self.everywhere.absorb(*first, state.everywhere, mask=mask),
            self.nearby.absorb(*last, state.nearby, mask=mask),
        )

    def read(self, q: Tensor, state: SplitState) -> Tensor:
        """Attend from q to all keys of both states."""
        first, last = q.split(self.heads_each, dim=1)
        return torch.cat((self.everywhere.read(first, state.everywhere), self.nearby.read(last, state.nearby)), dim=1)

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count the arithmetic of both groups."""
        return sum(group.count_flops(queries, keys, causal=causal) for group in (self.everywhere, self.nearby))

    def _split(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None
    ) -> tuple[Part, Part]:
        for name, x in (("log_decay", log_decay), ("beta", beta)):
            check_log_decay(x, k.shape[:-1], name=name)
        if beta is not None and not self.takes_beta:
            raise ValueError(NO_BETA)
        of_keys: list[dict[str, Any]] = [{}, {}]
        if log_decay is not None:
            of_keys[0]["log_decay"], of_keys[1]["log_decay"] = log_decay.split(self.keys_each, dim=1)
        if beta is not None:
            groups = (self.everywhere, self.nearby)
            for own, group, part in zip(of_keys, groups, beta.split(self.keys_each, dim=1), strict=True):
                own |= {"beta": part} if group.takes_beta else {}
        qkv = q.split(self.heads_each, dim=1), k.split(self.keys_each, dim=1), v.split(self.keys_each, dim=1)
        first, last = zip(*qkv, strict=True)
        return (first, of_keys[0]), (last, of_keys[1])
