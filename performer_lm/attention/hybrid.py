"""Choose the backend by layer: a pattern of names, repeated over depth.

Letters: as in `base.py`.
"""

from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from performer_lm.attention.base import Attention, AttentionFactory


class HybridAttention(Attention[Any]):
    """Run `backends[pattern[layer % len(pattern)]]`: few exact layers among linear ones keep recall at little cost.

    Args:
        pattern: names of backends, one per layer, repeated over depth.
        backends: factories by name; those that the pattern does not name are not built.
    """

    def __init__(
        self,
        *,
        heads: int,
        key_heads: int,
        dim_head: int,
        dim_value: int,
        layer: int,
        pattern: list[str],
        backends: dict[str, AttentionFactory],
    ) -> None:
        super().__init__(heads=heads, key_heads=key_heads, dim_head=dim_head, dim_value=dim_value, layer=layer)
        if not pattern or not backends:
            raise ValueError(f"attn.pattern must name at least one backend of {', '.join(backends)}; none is given")
        for name in pattern:
            if name not in backends:
                nearest = get_close_matches(name, backends, n=1) or [next(iter(backends))]
                raise ValueError(
                    f"attn.pattern: no backend {name!r}; did you mean {nearest[0]!r}? (choices: {', '.join(backends)})"
                )
        self.chosen = backends[pattern[layer % len(pattern)]](**self.sizes)
        self.attends_across = self.chosen.attends_across

    def check(self, *, causal: bool, packed: bool) -> None:
        """Refuse what the chosen backend cannot keep."""
        self.chosen.check(causal=causal, packed=packed)

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
        """Attend with this layer's backend."""
        return self.chosen(q, k, v, causal=causal, mask=mask, segments=segments, log_decay=log_decay)

    def init_state(self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the chosen backend's state before any token."""
        return self.chosen.init_state(batch, max_len=max_len, device=device, dtype=dtype)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Any,
        *,
        mask: Tensor | None = None,
        log_decay: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Append n tokens with this layer's backend."""
        return self.chosen.extend(q, k, v, state, mask=mask, log_decay=log_decay)

    def absorb(self, k: Tensor, v: Tensor, state: Any, *, mask: Tensor | None = None) -> Any:
        """Append keys to the chosen backend's state."""
        return self.chosen.absorb(k, v, state, mask=mask)

    def read(self, q: Tensor, state: Any) -> Tensor:
        """Attend from q to what the state holds."""
        return self.chosen.read(q, state)

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count the chosen backend's."""
        return self.chosen.count_flops(queries, keys, causal=causal)

    def redraw(self, step: int) -> None:
        """Redraw the chosen backend's projections, if it has any."""
        self.chosen.redraw(step)

    def fix_projections(self) -> None:
        """Keep the chosen backend's projections, if it has any."""
        self.chosen.fix_projections()
