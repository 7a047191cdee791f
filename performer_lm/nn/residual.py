"""Residual streams: how what the branches of all layers give adds up, and what is kept of it for the backward.

A scheme carries one or two streams through the branches: each reads the last stream, and what it gives is added.
Decoding, which needs no backward, goes through `open`, `add` and `close` one branch at a time.

Letters: `b` batch, `n` tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from performer_lm.nn.branch import Branch, TokenInfo
from performer_lm.nn.reversible import run_reversible

Streams = tuple[Tensor, ...]


class Residual(ABC):
    """A scheme of residual streams."""

    def open(self, x: Tensor) -> Streams:
        """Return the streams that x `(b, n, dim)` starts."""
        return (x,)

    def add(self, streams: Streams, given: Tensor) -> Streams:
        """Add what a branch gave for the last stream."""
        return (streams[-1] + given,)

    def close(self, streams: Streams) -> Tensor:
        """Return what the streams come to, `(b, n, dim)`."""
        return streams[-1]

    @abstractmethod
    def run(self, branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> Tensor:
        """Map x `(b, n, dim)` through all branches."""


class Plain(Residual):
    """One stream, x + f(x); autograd keeps what each branch needs (pre-norm: arXiv 2002.04745)."""

    def run(self, branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> Tensor:
        """Add up."""
        for branch in branches:
            x = x + branch(x, info)
        return x


class Recomputed(Plain):
    """One stream; the backward computes each branch anew from its input, which alone is kept (arXiv 1604.06174)."""

    def run(self, branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> Tensor:
        """Add up, keeping one `(b, n, dim)` per branch."""
        if not torch.is_grad_enabled():
            return super().run(branches, x, info)
        for branch in branches:
            x = x + checkpoint(branch, x, info, use_reentrant=False, preserve_rng_state=branch.training)
        return x


class Reversible(Residual):
    """Two streams that swap, (a, b) -> (b, a + f(b)); the backward computes the inputs from the outputs.

    (RevNet, arXiv 1707.04585; Reformer, arXiv 2001.04451.) What is kept does not grow with depth. Both streams start as
    x, and the result is their mean, so that branches that give zeros leave x as it is.
    """

    def open(self, x: Tensor) -> Streams:
        """Start both streams as x."""
        return x, x

    def add(self, streams: Streams, given: Tensor) -> Streams:
        """Swap, and add to the one that the branch did not read."""
        a, b = streams
        return b, a + given

    def close(self, streams: Streams) -> Tensor:
        """Return the mean."""
        a, b = streams
        return 0.5 * (a + b)

    def run(self, branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> Tensor:
        """Run all branches, keeping the last streams alone."""
        return self.close(run_reversible(branches, x, info))
