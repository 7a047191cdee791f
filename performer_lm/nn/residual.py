"""Residual streams: how the outputs of branches add up, and which vectors are kept for the backward.

A scheme carries one or two streams through the branches: each reads the last stream, and the output is added.
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


class Reversible(Residual):
    """Two streams that swap, (a, b) -> (b, a + f(b)); the backward computes the inputs from the outputs.

    (RevNet, arXiv 1707.04585; Reformer, arXiv 2001.04451.) The memory does not grow with depth. Both streams start as
    x, and the result is their mean, so that branches that give zeros return x.
    """

    def open(self, x: Tensor) -> Streams:
        """Return two streams, both x."""
        return x, x

    def add(self, streams: Streams, given: Tensor) -> Streams:
        """Swap the streams, and add to the stream that the branch did not read."""
        a, b = streams
        return b, a + given

    def close(self, streams: Streams) -> Tensor:
        """Return the mean of both streams."""
        a, b = streams
        return 0.5 * (a + b)

    def run(self, branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> Tensor:
        """Map x `(b, n, dim)` through all branches, keeping the last streams alone."""
        return self.close(run_reversible(branches, x, info))
