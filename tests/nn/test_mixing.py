import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from performer_lm.nn.initial import initialise
from performer_lm.nn.mixing import LogDecay, ShortConvolution, TokenShift, short_convolution


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
    with pytest.raises(ValueError, match="taps must be at least 1, got 0"):
        ShortConvolution(4, taps=0)


def test_decay_is_never_above_zero_and_per_head() -> None:
    layer = LogDecay(6, key_heads=3)
    out = layer(10 * torch.randn(2, 7, 6))
    assert out.shape == (2, 3, 7)
    assert out.dtype == torch.float32
    assert bool((out <= 0).all())


@pytest.mark.parametrize("key_heads", [1, 2, 5])
def test_the_first_head_starts_with_a_half_life_of_hundreds_of_tokens(key_heads: int) -> None:
    layer = nn.ModuleList([LogDecay(6, key_heads=key_heads)])
    initialise(layer)
    half_lives = math.log(0.5) / layer[0](torch.randn(1, 1, 6))[0, :, 0].detach()
    assert float(half_lives[0]) > 500
    assert half_lives.tolist() == sorted(half_lives.tolist(), reverse=True)


def shift(x: torch.Tensor, *, causal: bool, **options: torch.Tensor) -> torch.Tensor:
    layer = TokenShift(x.shape[2], causal=causal)
    return layer(x, layer.init_tail(x.shape[0], device=x.device, dtype=x.dtype), **options)[0]


@pytest.mark.parametrize("dim", [2, 6, 7])
def test_causal_shift_takes_half_from_the_token_before(dim: int) -> None:
    x, half = torch.randn(2, 5, dim), dim // 2
    out = shift(x, causal=True)
    torch.testing.assert_close(out[:, 1:, half : 2 * half], x[:, :-1, half : 2 * half])
    assert bool((out[:, 0, half : 2 * half] == 0).all())
    torch.testing.assert_close(out[..., :half], x[..., :half])
    torch.testing.assert_close(out[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("dim", [3, 6, 8])
def test_bidirectional_shift_takes_a_third_from_each_side(dim: int) -> None:
    x, third = torch.randn(2, 5, dim), dim // 3
    out = shift(x, causal=False)
    torch.testing.assert_close(out[:, :-1, :third], x[:, 1:, :third])
    torch.testing.assert_close(out[:, 1:, 2 * third : 3 * third], x[:, :-1, 2 * third : 3 * third])
    assert bool((out[:, -1, :third] == 0).all())
    assert bool((out[:, 0, 2 * third : 3 * third] == 0).all())
    torch.testing.assert_close(out[..., third : 2 * third], x[..., third : 2 * third])


@given(n=st.integers(1, 9), cut=st.integers(0, 9), pads=st.integers(0, 4))
def test_any_split_of_a_shifted_stream_gives_the_whole(n: int, cut: int, pads: int) -> None:
    layer, x = TokenShift(6, causal=True), torch.randn(1, pads + n, 6)
    mask = torch.arange(pads + n)[None] >= pads
    start = layer.init_tail(1, device=x.device, dtype=x.dtype)
    whole, tail = layer(x, start, mask=mask)
    first, middle = layer(x[:, :cut], start, mask=mask[:, :cut])
    second, end = layer(x[:, cut:], middle, mask=mask[:, cut:])
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, tail)
    torch.testing.assert_close(whole[:, pads:], layer(x[:, pads:], start)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_a_shift_stops_at_documents(causal: bool) -> None:
    one, two = torch.randn(1, 4, 6), torch.randn(1, 3, 6)
    segments = torch.tensor([[0] * 4 + [1] * 3])
    apart = torch.cat([shift(x, causal=causal) for x in (one, two)], 1)
    torch.testing.assert_close(shift(torch.cat((one, two), 1), causal=causal, segments=segments), apart)


def test_a_shift_needs_channels() -> None:
    with pytest.raises(ValueError, match="dim of at least 3, got 2"):
        TokenShift(2, causal=False)


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
def test_gradients_of_shifted_products_are_right(n: int, taps: int) -> None:
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
