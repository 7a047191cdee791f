import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from performer_lm.ops.convolution import short_convolution


def inputs(n: int, taps: int, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, n, channels), (2, taps - 1, channels), (taps, channels)
    x, tail, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x, tail, weight


def reference(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
    return F.conv1d(torch.cat((tail, x), 1).mT, weight.flip(0).mT[:, None], groups=x.shape[-1]).mT


@given(n=st.integers(1, 12), taps=st.integers(1, 6))
def test_equals_grouped_conv1d_with_its_gradients(n: int, taps: int) -> None:
    ours, theirs = inputs(n, taps), inputs(n, taps)
    for one, other in zip(ours, theirs, strict=True):
        other.data.copy_(one.data)
    out, wanted = short_convolution(*ours), reference(*theirs)
    torch.testing.assert_close(out, wanted)
    direction = torch.randn_like(out)
    out.backward(direction)
    wanted.backward(direction)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(("n", "taps"), [(1, 4), (2, 4), (7, 4), (5, 1)])
def test_gradients_are_right(n: int, taps: int) -> None:
    assert torch.autograd.gradcheck(short_convolution, inputs(n, taps))


@given(n=st.integers(1, 12), taps=st.integers(1, 6))
def test_one_document_is_no_document(n: int, taps: int) -> None:
    x, tail, weight = inputs(n, taps)
    out = short_convolution(x, torch.zeros_like(tail), weight)
    torch.testing.assert_close(short_convolution(x, tail, weight, segments=torch.zeros(2, n)), out)


def test_keeps_bfloat16_and_runs_on_meta() -> None:
    x, tail, weight = (tensor.detach().bfloat16() for tensor in inputs(5, 4))
    assert short_convolution(x, tail, weight).dtype == torch.bfloat16
    assert short_convolution(x.to("meta"), tail.to("meta"), weight.to("meta")).shape == x.shape
