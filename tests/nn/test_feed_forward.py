import pytest
import torch
from torch.nn import functional as F

from performer_lm.nn.feed_forward import ACTIVATIONS, FeedForward


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plain_is_out_of_act_of_in(activation: str) -> None:
    layer = FeedForward(6, mult=1.5, activation=activation)
    x = torch.randn(2, 3, 6)
    hidden = ACTIVATIONS[activation](x @ layer.project_in.weight.T)
    assert hidden.shape[-1] == 9
    torch.testing.assert_close(layer(x), hidden @ layer.project_out.weight.T)


def test_gated_is_swiglu() -> None:
    layer = FeedForward(6, mult=2, activation="silu", gated=True)
    assert layer.gate is not None
    x = torch.randn(2, 3, 6)
    hidden = F.silu(x @ layer.gate.weight.T) * (x @ layer.project_in.weight.T)
    torch.testing.assert_close(layer(x), hidden @ layer.project_out.weight.T)


@pytest.mark.parametrize("options", [{}, {"gated": True, "bias": True}])
@pytest.mark.parametrize("chunks", [2, 3, 50])
def test_chunks_change_nothing_but_memory(options: dict[str, bool], chunks: int) -> None:
    whole = FeedForward(6, mult=3, activation="gelu", **options).double()
    pieces = FeedForward(6, mult=3, activation="gelu", chunks=chunks, **options).double()
    pieces.load_state_dict(whole.state_dict())
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (whole, pieces):
        out = layer(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(pieces(x), found[0][0])


def test_chunks_keep_no_hidden_values() -> None:
    x, kept = torch.randn(1, 64, 6, requires_grad=True), {}
    for chunks in (1, 8):
        sizes: dict[int, int] = {}

        def pack(saved: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            out = FeedForward(6, mult=8, activation="gelu", chunks=chunks)(x)
        kept[chunks] = sum(sizes.values())
        del out
    assert kept[8] < kept[1] / 8


def test_dropout_is_off_in_evaluation() -> None:
    layer = FeedForward(6, mult=2, activation="relu", dropout=0.9)
    x = torch.randn(2, 3, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_unknown_activation_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"must be one of gelu, .* got 'tanhh'"):
        FeedForward(6, mult=2, activation="tanhh")


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        FeedForward(6, mult=2, activation="gelu", chunks=0)
    with pytest.raises(ValueError, match=r"\(6 x 0.01\) must be at least 1"):
        FeedForward(6, mult=0.01, activation="gelu")
