"""Reversible layers: a backward that recovers the input of every branch from the outputs, so none is kept.

With streams (a, b) a branch f gives (a', b') = (b, a + f(b)); so b = a', and a = b' - f(a'), where f(a') is computed
anew with the random numbers and the autocast of its forward. Those belong to the call, not to the module: several
forwards may come before one backward, in training or in evaluation mode. Parameters and the context are inputs of the
autograd node, so that their gradients arrive once, as hooks of data-parallel wrappers expect.

Letters: `b` batch, `n` tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from performer_lm.nn.branch import Branch, Residual, Streams, TokenInfo


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


@torch.compiler.disable  # a compiled model calls this as it is
def run_reversible(branches: Sequence[Branch], x: Tensor, info: TokenInfo) -> tuple[Tensor, Tensor]:
    """Run both streams, started as x `(b, n, dim)`, through the branches."""
    vectors = None if info.context is None else info.context.vectors
    parameters = [p for branch in branches for p in branch.parameters() if p.requires_grad]
    wanted = any(t.requires_grad for t in (x, *([] if vectors is None else [vectors]), *parameters))
    if torch.is_grad_enabled() and wanted:
        return _Reversible.apply(branches, info, x, vectors, *parameters)
    a, b = x, x
    for branch in branches:
        a, b = b, a + branch(b, info)
    return a, b


class _Reversible(torch.autograd.Function):
    """`apply(branches, info, x, context vectors, *trainable parameters of the branches in order)`."""

    @staticmethod
    def forward(
        ctx: Any, branches: Sequence[Branch], info: TokenInfo, x: Tensor, vectors: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.branches, ctx.info, ctx.environment = branches, info, []
        a, b = x, x
        for branch in branches:
            ctx.environment.append(_Environment.now(branch, b))
            a, b = b, a + branch(b, info)
        ctx.save_for_backward(a, b, vectors)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Any, ...]:
        a, b, vectors = ctx.saved_tensors
        grad_vectors = None if vectors is None else torch.zeros_like(vectors)
        grads: list[Tensor | None] = []
        for branch, environment in zip(reversed(ctx.branches), reversed(ctx.environment), strict=True):
            given, pulled = _pull(branch, environment, a, vectors, ctx.info, grad_b)
            a, b = b - given, a
            grad_a, grad_b = grad_b, grad_a + pulled.x
            if grad_vectors is not None and pulled.vectors is not None:
                grad_vectors += pulled.vectors
            grads = [*pulled.parameters, *grads]
        return None, None, grad_a + grad_b, grad_vectors, *grads


class _Pulled(NamedTuple):
    """Gradients at the inputs of a branch."""

    x: Tensor
    vectors: Tensor | None
    parameters: Sequence[Tensor | None]


def _pull(
    branch: Branch, environment: "_Environment", x: Tensor, vectors: Tensor | None, info: TokenInfo, grad: Tensor
) -> tuple[Tensor, _Pulled]:
    """Compute a branch anew in its environment, and pull the gradient at the output back through the branch."""
    x = x.detach().requires_grad_()
    leaves: list[Tensor] = [x, *(p for p in branch.parameters() if p.requires_grad)]
    if vectors is not None and info.context is not None:
        vectors = vectors.detach().requires_grad_()
        leaves.append(vectors)
        info = info._replace(context=info.context._replace(vectors=vectors))
    with environment.restored(), torch.enable_grad():
        given = branch(x, info)
    found = list(torch.autograd.grad(given, leaves, grad.to(given.dtype), allow_unused=True))
    grad_vectors = found.pop() if vectors is not None else None
    grad_x, *grad_parameters = found
    assert grad_x is not None, "a branch that ignores its input"
    return given.detach(), _Pulled(grad_x, grad_vectors, grad_parameters)


class _Environment(NamedTuple):
    """The state beside the inputs that a branch depends on: autocast and, in training, random generators."""

    autocasts: list[dict[str, Any]]
    device: str
    host_random: Tensor | None
    device_random: tuple[list[int], list[Tensor]]

    @classmethod
    def now(cls, branch: Branch, x: Tensor) -> "_Environment":
        """Return the environment of a branch that is about to read x."""
        device = x.device.type
        kinds = [kind for kind in dict.fromkeys(("cpu", device)) if torch.amp.is_autocast_available(kind)]
        autocasts = [
            {
                "device_type": kind,
                "dtype": torch.get_autocast_dtype(kind),
                "enabled": torch.is_autocast_enabled(kind),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for kind in kinds
        ]
        if not branch.training:
            return cls(autocasts, device, None, ([], []))
        return cls(autocasts, device, torch.get_rng_state(), get_device_states(x))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the environment inside a `with` block."""
        with ExitStack() as stack:
            if self.host_random is not None:
                devices, states = self.device_random
                stack.enter_context(torch.random.fork_rng(devices, device_type=self.device if devices else None))
                torch.set_rng_state(self.host_random)
                set_device_states(devices, states, device_type=self.device)
            for autocast in self.autocasts:
                stack.enter_context(torch.autocast(**autocast))
            yield
