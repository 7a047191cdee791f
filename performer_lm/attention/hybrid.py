"""Choose the backend by layer: a pattern of names, repeated over depth.

Letters: as in `base.py`.
"""

from difflib import get_close_matches
from typing import Any, Unpack

from torch import Tensor

from performer_lm.attention.base import Attention, AttentionFactory, Sizes


class HybridAttention(Attention[Any]):
    """Run `backends[pattern[layer % len(pattern)]]`: few exact layers among linear ones keep recall at little cost.

    Args:
        pattern: names of backends, one per layer, repeated over depth.
        backends: factories by name; those that the pattern does not name are not built.
        sizes: those of `Attention`.
    """

    def __init__(self, *, pattern: list[str], backends: dict[str, AttentionFactory], **sizes: Unpack[Sizes]) -> None:
        super().__init__(**sizes)
        if not pattern or not backends:
            raise ValueError(f"attn.pattern must name at least one backend of {', '.join(backends)}; none is given")
        for name in pattern:
            if name not in backends:
                nearest = get_close_matches(name, backends, n=1) or [next(iter(backends))]
                raise ValueError(
                    f"attn.pattern: no backend {name!r}; did you mean {nearest[0]!r}? (choices: {', '.join(backends)})"
                )
        self.chosen = backends[pattern[self.layer % len(pattern)]](**self.sizes)
        self.keys_each = self.chosen.keys_each
        self.attends_across, self.takes_beta = self.chosen.attends_across, self.chosen.takes_beta

    def check(self, **use: bool) -> None:
        """Refuse an order or packed documents that the chosen backend cannot handle."""
        self.chosen.check(**use)

    def forward(self, *qkv: Tensor, **options: Any) -> Tensor:
        """Attend over a whole sequence with the chosen backend."""
        return self.chosen(*qkv, **options)

    def init_state(self, batch: int, **options: Any) -> Any:
        """Return the chosen backend's state before any token."""
        return self.chosen.init_state(batch, **options)

    def extend(self, *tokens: Any, **options: Any) -> tuple[Tensor, Any]:
        """Append n tokens with the chosen backend."""
        return self.chosen.extend(*tokens, **options)

    def absorb(self, *keys: Any, **options: Any) -> Any:
        """Append keys to the chosen backend's state."""
        return self.chosen.absorb(*keys, **options)

    def read(self, q: Tensor, state: Any) -> Tensor:
        """Attend from q to all keys of the chosen backend's state."""
        return self.chosen.read(q, state)

    def count_flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Count the chosen backend's arithmetic."""
        return self.chosen.count_flops(queries, keys, causal=causal)
