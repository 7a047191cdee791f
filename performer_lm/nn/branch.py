"""A branch of a layer: the vectors that attention or feed-forward adds to the stream, and how these add up.

A scheme of residual streams carries one or two of them through the branches: each reads the last stream, and the output
is added. Decoding, which needs no backward, goes through `open`, `add` and `close` one branch at a time.

Letters: `b` batch, `n` tokens, `j` tokens of the context.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from performer_lm.nn.mixing import TokenShift

Streams = tuple[Tensor, ...]


class Context(NamedTuple):
    """Another sequence, which cross-attention looks at."""

    vectors: Tensor  # (b, j, dim)
    mask: Tensor | None = None  # (b, j) bool: False keys are absent


class TokenInfo(NamedTuple):
    """The places, padding, documents and context of tokens, which branches are given beside the vectors."""

    places: Tensor  # (b, n): each token's place in its own document, from 0
    mask: Tensor | None = None  # (b, n) bool: False at padding
    segments: Tensor | None = None  # (b, n): ids of packed documents
    context: Context | None = None

    @classmethod
    def of(
        cls, x: Tensor, mask: Tensor | None, segments: Tensor | None = None, context: Context | None = None
    ) -> "TokenInfo":
        """Return the info of tokens `(b, n, dim)` with their places in their documents, from 0.

        Real tokens alone count; pads before the first get -1.
        """
        if mask is None:
            places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        else:
            places = mask.to(torch.int64).cumsum(1) - 1
        if segments is not None:
            starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
            first = places if mask is None else places + ~mask  # a document that opens with pads starts after them
            places = places - torch.where(starts, first, 0).cummax(1).values
        return cls(places, mask, segments, context)


class Body(nn.Module, ABC):
    """The computation inside a branch. The state defaults to none: each token alone."""

    @abstractmethod
    def forward(self, x: Tensor, info: TokenInfo) -> Tensor:
        """Map whole sequences `(b, n, dim)` to `(b, n, dim)`."""

    def init_state(
        self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype, context: Context | None
    ) -> Any:
        """Return the state of `batch` streams before any token, with the context read."""
        return None

    def extend(self, x: Tensor, state: Any, info: TokenInfo) -> tuple[Tensor, Any]:
        """Append n tokens `(b, n, dim)` causally; may consume `state`."""
        return self(x, info), state

    def count_flops(self, tokens: int, *, context: int) -> int:
        """Return the arithmetic of one sequence's forward: two operations for each multiply-add of a matrix product."""
        return 2 * tokens * count_weights(self)


def count_weights(module: nn.Module) -> int:
    """Return the number of multiply-adds that the linear layers of a module do for a token."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


class BranchState(NamedTuple):
    """The decoding state of a branch."""

    body: Any
    tail: Tensor | None  # (b, 1, c): the token shift's last input


class Branch(nn.Module):
    """`gate * dropout(body(shift(norm(x))))`, to be added to the stream.

    Args:
        dim: width of the stream.
        body: the computation inside.
        norm: factory called with dim.
        shift: token shift before the body, if any.
        dropout: share of the body's output dropped.
        rezero: whether the gate exists: one learned number, at first 0 (arXiv 2003.04887).

    Raises:
        ValueError: for a gate beside a norm with weights.
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
        if rezero and any(True for _ in self.norm.parameters()):
            raise ValueError("rezero stands in the place of norms: set norm to none")
        self.shift = shift
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.zeros(1)) if rezero else None

    def forward(self, x: Tensor, info: TokenInfo) -> Tensor:
        """Map whole sequences `(b, n, dim)` to the vectors added to the stream."""
        x = self.norm(x)
        if self.shift is not None:
            x, _ = self.shift(x, mask=info.mask, segments=info.segments)
        return self._weigh(self.body(x, info))

    def init_state(
        self, batch: int, *, max_len: int, device: torch.device, dtype: torch.dtype, context: Context | None
    ) -> BranchState:
        """Return the state of `batch` streams before any token."""
        body = self.body.init_state(batch, max_len=max_len, device=device, dtype=dtype, context=context)
        tail = None if self.shift is None else self.shift.init_tail(batch, device=device, dtype=dtype)
        return BranchState(body, tail)

    def extend(self, x: Tensor, state: BranchState, info: TokenInfo) -> tuple[Tensor, BranchState]:
        """Append n tokens `(b, n, dim)` causally."""
        body, tail = state
        x = self.norm(x)
        if self.shift is not None:
            x, tail = self.shift(x, tail, mask=info.mask)
        out, body = self.body.extend(x, body, info)
        return self._weigh(out), BranchState(body, tail)

    def _weigh(self, out: Tensor) -> Tensor:
        out = self.dropout(out)
        return out if self.gate is None else out * self.gate.to(out.dtype)


class Residual(ABC):
    """A scheme of residual streams."""

    def open(self, x: Tensor) -> Streams:
        """Return the streams that x `(b, n, dim)` starts."""
        return (x,)

    def add(self, streams: Streams, given: Tensor) -> Streams:
        """Add the output of a branch that read the last stream."""
        return (streams[-1] + given,)

    def close(self, streams: Streams) -> Tensor:
        """Return the result of the streams, `(b, n, dim)`."""
        return streams[-1]

    @abstractmethod
    def run(self, branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> Tensor:
        """Map x `(b, n, dim)` through all branches."""


class Plain(Residual):
    """One stream, x + f(x); autograd keeps what each branch needs (pre-norm: arXiv 2002.04745)."""

    def run(self, branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> Tensor:
        """Map x `(b, n, dim)` through all branches, kept whole by autograd."""
        for branch in branches:
            x = x + branch(x, info)
        return x


class Recomputed(Plain):
    """One stream; the backward computes each branch anew from the input, which alone is kept (arXiv 1604.06174)."""

    def run(self, branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> Tensor:
        """Map x `(b, n, dim)` through all branches, keeping one `(b, n, dim)` each."""
        if not torch.is_grad_enabled():
            return super().run(branches, x, info)
        for branch in branches:
            x = x + checkpoint(branch, x, info, use_reentrant=False, preserve_rng_state=branch.training)
        return x
