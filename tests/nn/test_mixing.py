import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from performer_lm.nn.mixing import LogDecay, ShortConvolution


def convolution(channels: int, taps: int) -> ShortConvolution:
    layer = ShortConvolution(channels, taps=taps).double()
    torch.nn.init.normal_(layer.weight)
    return layer


def start(layer: ShortConvolution, batch: int) -> torch.Tensor:
    return layer.init_tail(batch, device=torch.device("cpu"), dtype=torch.float64)


@given(n=st.integers(1, 12), taps=st.integers(1, 5), channels=st.integers(1, 4))
def test_equals_grouped_conv1d(n: int, taps: int, channels: int) -> None:
    layer = convolution(channels, taps)
    x = torch.randn(2, n, channels, dtype=torch.float64)
    out, _ = layer(x, start(layer, 2))
    kernel = layer.weight.flip(0).mT[:, None]
    wanted = F.conv1d(F.pad(x.mT, (taps - 1, 0)), kernel, groups=channels).mT
    torch.testing.assert_close(out, F.silu(wanted))


@given(n=st.integers(1, 12), cut=st.integers(0, 12), taps=st.integers(1, 5))
def test_any_split_gives_the_whole(n: int, cut: int, taps: int) -> None:
    layer = convolution(3, taps)
    x = torch.randn(2, n, 3, dtype=torch.float64)
    whole, tail = layer(x, start(layer, 2))
    first, middle = layer(x[:, :cut], start(layer, 2))
    second, end = layer(x[:, cut:], middle)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, tail)


@given(n=st.integers(1, 8), pads=st.integers(0, 6), taps=st.integers(1, 5))
def test_left_padding_changes_nothing(n: int, pads: int, taps: int) -> None:
    layer = convolution(3, taps)
    x = torch.randn(1, n, 3, dtype=torch.float64)
    loud = torch.cat((torch.full((1, pads, 3), 9.0, dtype=torch.float64), x), 1)
    mask = torch.arange(pads + n)[None] >= pads
    out, tail = layer(loud, start(layer, 1), mask=mask)
    wanted, wanted_tail = layer(x, start(layer, 1))
    torch.testing.assert_close(out[:, pads:], wanted)
    torch.testing.assert_close(tail, wanted_tail)


@given(first=st.integers(1, 6), second=st.integers(1, 6), taps=st.integers(1, 5))
def test_documents_do_not_mix(first: int, second: int, taps: int) -> None:
    layer = convolution(2, taps)
    one, two = (torch.randn(1, n, 2, dtype=torch.float64) for n in (first, second))
    segments = torch.tensor([[0] * first + [1] * second])
    out, _ = layer(torch.cat((one, two), 1), start(layer, 1), segments=segments)
    apart = torch.cat([layer(x, start(layer, 1))[0] for x in (one, two)], 1)
    torch.testing.assert_close(out, apart)


def test_gradients_are_right() -> None:
    layer = convolution(2, 4)
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    tail = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: layer(*inputs), (x, tail))


def test_no_taps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 tap, got 0"):
        ShortConvolution(4, taps=0)


def test_decay_is_never_above_zero_and_per_head() -> None:
    layer = LogDecay(6, key_heads=3)
    out = layer(10 * torch.randn(2, 7, 6))
    assert out.shape == (2, 3, 7)
    assert out.dtype == torch.float32
    assert bool((out <= 0).all())
