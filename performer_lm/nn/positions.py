"""What tells the heads where a token stands: a rotation of q and k by position, or nothing.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `d` head width.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from performer_lm.ops.rotary import rotate


class Positions(nn.Module, ABC):
    """Put positions into queries and keys; built per layer as a factory called with `dim_head`."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Map `(b, h, n, d)`, `(b, g, n, d)` and token positions `(b, n)` to the q and k that attention compares."""


class NoPositions(Positions):
    """Leave q and k alone: convolution and decay already tell order (FAVOR and `log_decay` need no more)."""

    def __init__(self, *, dim_head: int) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k unchanged."""
        del positions
        return q, k


class Rotary(Positions):
    """Rotary embedding of the first `width` channels of each head (arXiv 2104.09864); no length limit."""

    def __init__(self, *, dim_head: int, base: float = 10_000.0, width: int | None = None) -> None:
        super().__init__()
        self.base = base
        self.width = dim_head if width is None else width
        if self.width % 2 or not 0 < self.width <= dim_head:
            raise ValueError(f"rotary width must be even and within 2..{dim_head} (dim_head), got {self.width}")

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k by the tokens' positions."""
        q = rotate(q, positions, base=self.base, width=self.width)
        return q, rotate(k, positions, base=self.base, width=self.width)
