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


def test_dropout_is_off_in_evaluation() -> None:
    layer = FeedForward(6, mult=2, activation="relu", dropout=0.9)
    x = torch.randn(2, 3, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_unknown_activation_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"must be one of gelu, .* got 'tanhh'"):
        FeedForward(6, mult=2, activation="tanhh")
