"""Places of tokens, put into queries and keys or added to the stream.

`Positions` act inside each head: a rotation of q and k, or nothing. `AbsolutePositions` are added to the stream before
the first layer. Both are given the token's place in its own document, so that padding, packing and continued decoding
agree.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `d` head width.
"""

from abc import ABC, abstractmethod
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from performer_lm.ops.rotary import rotate
from performer_lm.ranges import Count, Positive, ranged


class Positions(nn.Module, ABC):
    """Put positions into queries and keys; built per layer as a factory called with `dim_head`."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Map `(b, h, n, d)`, `(b, g, n, d)` and token places `(b, n)` to the q and k that attention compares."""


class NoPositions(Positions):
    """Return q and k unchanged: convolution and decay already tell order (FAVOR and `log_decay` need no more)."""

    def __init__(self, *, dim_head: int) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k unchanged."""
        return q, k


@ranged
class Rotary(Positions):
    """Rotary embedding of the first `width` channels of each head (arXiv 2104.09864); no length limit.

    `interleaved` pairs channels 2c and 2c + 1; else channel c goes with c + width / 2.
    """

    def __init__(
        self,
        *,
        dim_head: int,
        base: Positive = 10_000.0,
        width: Annotated[int, Ge(2)] | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.width = dim_head if width is None else width
        self.interleaved = interleaved
        if self.width % 2 or not 0 < self.width <= dim_head:
            raise ValueError(f"rotary width must be even and within 2..{dim_head} (dim_head), got {self.width}")

    def forward(self, q: Tensor, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k by the tokens' places."""
        q, k = (rotate(x, places, base=self.base, width=self.width, interleaved=self.interleaved) for x in (q, k))
        return q, k


class AbsolutePositions(nn.Module, ABC):
    """Vectors of places, added to the stream; built once as a factory called with dim."""

    max_len: int | None = None
    """The number of places; None where there is no end."""

    @abstractmethod
    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Add to x `(b, n, dim)` the vectors of the places `(b, n)`; at pads, below 0, those mean nothing."""


class NoAbsolutePositions(AbsolutePositions):
    """Add nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Return x."""
        return x


@ranged
class SinusoidalPositions(AbsolutePositions):
    """Sines, then cosines, of geometrically spaced frequencies (arXiv 1706.03762), computed on the fly."""

    def __init__(self, dim: int, *, base: Positive = 10_000.0) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"sinusoidal positions need an even dim, got {dim}")
        self.base = base

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Add unit sinusoids."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        exponents = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype) / x.shape[-1]
        angles = places.to(dtype)[..., None] * self.base**-exponents
        return x + torch.cat((angles.sin(), angles.cos()), dim=-1).to(x.dtype)


@ranged
class LearnedPositions(AbsolutePositions):
    """One learned vector for each of `max_len` places."""

    def __init__(self, dim: int, *, max_len: Count) -> None:
        super().__init__()
        self.max_len = max_len
        self.vectors = nn.Parameter(torch.empty(max_len, dim))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Add the places' vectors."""
        return x + self.vectors[places.clamp(min=0)].to(x.dtype)


@ranged
class AxialPositions(AbsolutePositions):
    """Places on a learned grid of `shape`: the vector of a row plus that of a column (after arXiv 1912.12180).

    Place p stands in row p // columns and column p % columns: rows + columns vectors tell rows x columns places.
    """

    def __init__(self, dim: int, *, shape: list[Count]) -> None:
        super().__init__()
        if len(shape) != 2:
            raise ValueError(f"axial positions need a shape of two sizes, [rows, columns], got {list(shape)}")
        self.max_len = shape[0] * shape[1]
        self.rows = nn.Parameter(torch.empty(shape[0], dim))
        self.columns = nn.Parameter(torch.empty(shape[1], dim))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Add the vectors of the places' rows and columns."""
        places = places.clamp(min=0)
        row = places.div(len(self.columns), rounding_mode="floor")
        return x + (self.rows[row] + self.columns[places % len(self.columns)]).to(x.dtype)
