"""A branch of a layer: what one part of it (attention, feed-forward) adds to the stream, and its decoding state.

Letters: `b` batch, `n` tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from performer_lm.nn.layout import Context, Layout
from performer_lm.nn.mixing import TokenShift


class Body(nn.Module, ABC):
    """What a branch computes. The state defaults to none: each token alone."""

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map whole sequences `(b, n, dim)` to `(b, n, dim)`."""

    def init_state(
        self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype, context: Context | None
    ) -> Any:
        """Return the state of `batch` streams before any token, with what is to be kept of the context."""
        del batch, max_len, device, dtype, context
        return None

    def extend(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, Any]:
        """Append n tokens `(b, n, dim)` causally; may consume `state`."""
        return self(x, layout), state

    def count_flops(self, tokens: int, *, context: int) -> int:
        """Return the arithmetic of one sequence's forward: two operations for each multiply-add of a matrix product."""
        del context
        return 2 * tokens * count_weights(self)


def count_weights(module: nn.Module) -> int:
    """Return how many multiply-adds the linear layers of a module do for a token."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


class BranchState(NamedTuple):
    """What one branch carries from token to token while decoding."""

    body: Any
    tail: Tensor | None  # (b, 1, c): the token shift's last input


class Branch(nn.Module):
    """`gate * dropout(body(shift(norm(x))))`, to be added to the stream.

    Args:
        dim: width of the stream.
        body: what the branch computes.
        norm: factory called with dim.
        shift: token shift before the body, if any.
        dropout: share of the body's output dropped.
        rezero: whether the gate exists: one learned number, at first 0 (arXiv 2003.04887).
    """

    def __init__(
        self,
        dim: int,
        *,
        body: Body,
        norm: Callable[..., nn.Module],
        shift: TokenShift | None = None,
        dropout: float = 0.0,
        rezero: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.shift = shift
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.zeros(1)) if rezero else None

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map whole sequences `(b, n, dim)` to what is added to them."""
        x = self.norm(x)
        if self.shift is not None:
            tail = self.shift.init_tail(x.shape[0], device=x.device, dtype=x.dtype)
            x, _ = self.shift(x, tail, mask=layout.mask, segments=layout.segments)
        return self._weigh(self.body(x, layout))

    def init_state(
        self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype, context: Context | None
    ) -> BranchState:
        """Return the state of `batch` streams before any token."""
        body = self.body.init_state(batch, max_len=max_len, device=device, dtype=dtype, context=context)
        tail = None if self.shift is None else self.shift.init_tail(batch, device=device, dtype=dtype)
        return BranchState(body, tail)

    def extend(self, x: Tensor, state: BranchState, layout: Layout) -> tuple[Tensor, BranchState]:
        """Append n tokens `(b, n, dim)` causally."""
        body, tail = state
        x = self.norm(x)
        if self.shift is not None:
            assert tail is not None
            x, tail = self.shift(x, tail, mask=layout.mask)
        out, body = self.body.extend(x, body, layout)
        return self._weigh(out), BranchState(body, tail)

    def _weigh(self, out: Tensor) -> Tensor:
        out = self.dropout(out)
        return out if self.gate is None else out * self.gate.to(out.dtype)
