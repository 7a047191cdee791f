from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from performer_lm.ops import linear_cross_entropy

IGNORE = -100


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none").reshape(targets.shape)


def inputs(*shape: int, vocab: int = 30, dim: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    hidden = torch.randn(*shape, dim, dtype=dtype).mul_(3.0).requires_grad_()
    weight = torch.randn(vocab, dim, dtype=dtype).requires_grad_()
    targets = torch.where(torch.rand(shape) < 0.2, IGNORE, torch.randint(vocab, shape))
    return hidden, weight, targets


@given(n=st.integers(1, 40), chunk_size=st.integers(1, 45), biased=st.booleans())
def test_any_chunk_gives_the_losses_and_gradients_of_the_whole(n: int, chunk_size: int, biased: bool) -> None:
    hidden, weight, targets = inputs(2, n)
    bias = torch.randn(30, dtype=torch.float64).requires_grad_() if biased else None
    upstream = torch.randn(2, n, dtype=torch.float64)
    expected = plain(hidden, weight, targets, bias)
    found = linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size, bias=bias)
    learned = [hidden, weight, *([bias] if bias is not None else [])]
    results = [(losses, *torch.autograd.grad(losses, learned, upstream)) for losses in (found, expected)]
    torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=1e-10)


def test_loud_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(50, dtype=torch.float32)
    found = linear_cross_entropy(1e4 * hidden, weight, targets, chunk_size=8)
    torch.testing.assert_close(found, plain(1e4 * hidden, weight, targets))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.sum(), (hidden, weight)))


def test_what_is_ignored_counts_nothing() -> None:
    hidden, weight, targets = inputs(9)
    found = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE), chunk_size=4)
    assert not found.any()
    assert not any(grad.any() for grad in torch.autograd.grad(found.sum(), (hidden, weight)))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient(frozen: int) -> None:
    tensors = inputs(9)
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(*tensors, chunk_size=4).sum().backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    hidden, weight, targets = inputs(4, 300, vocab=500, dim=64, dtype=torch.float32)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    exact = plain(*rounded, targets)
    exact_grads = torch.autograd.grad(exact.sum(), rounded)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets, chunk_size=32)
        by_layer = plain(hidden, weight, targets)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1.01 * (by_layer - exact).norm()
    grads, layer_grads = (torch.autograd.grad(losses.sum(), (hidden, weight)) for losses in (found, by_layer))
    for grad, layer_grad, expected in zip(grads, layer_grads, exact_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - expected).norm() < 1.01 * (layer_grad - expected).norm()


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    hidden, weight, targets = inputs(256, vocab=1000, dim=8)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, chunk_size=16).sum().backward()
    assert largest.numel == 16 * 1000


def test_nothing_is_asked_of_the_device() -> None:
    hidden, weight, targets = (x.detach().to("meta") for x in inputs(2, 9))
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets, chunk_size=4)
    loss.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize(
    ("shapes", "chunk_size", "message"),
    [
        (((2, 3, 4), (5, 4), (2, 3)), 0, "chunk_size must be at least 1, got 0"),
        (((2, 3, 4), (5, 6), (2, 3)), 1, r"wanted hidden \(\.\.\., dim\).* got \(2, 3, 4\), \(5, 6\) and \(2, 3\)"),
        (((2, 3, 4), (5, 4), (2, 2)), 1, r"got \(2, 3, 4\), \(5, 4\) and \(2, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: Any, chunk_size: int, message: str) -> None:
    hidden, weight, targets = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets.long(), chunk_size=chunk_size)
