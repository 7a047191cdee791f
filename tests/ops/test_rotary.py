import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.ops.rotary import rotate


@given(d=st.integers(1, 8).map(lambda half: 2 * half), shift=st.integers(0, 5000), n=st.integers(1, 9))
def test_scores_depend_on_distance_alone(d: int, shift: int, n: int) -> None:
    q, k = torch.randn(2, 1, 1, n, d, dtype=torch.float64)
    places = torch.arange(n)
    near = rotate(q, places) @ rotate(k, places).mT
    far = rotate(q, places + shift) @ rotate(k, places + shift).mT
    torch.testing.assert_close(near, far, atol=1e-9, rtol=0)


def test_norms_are_kept_and_position_zero_turns_nothing() -> None:
    x = torch.randn(2, 3, 5, 8)
    turned = rotate(x, torch.arange(5))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])


def test_the_angle_is_the_papers() -> None:
    x = torch.zeros(1, 1, 1, 4)
    x[..., 0] = 1  # first channel of pair 0, which turns by one radian a token
    turned = rotate(x, torch.tensor([1.0]))
    torch.testing.assert_close(turned.flatten(), torch.tensor([1.0, 0, 1.0, 0]) * _cos_sin())


def _cos_sin() -> torch.Tensor:
    one = torch.tensor(1.0)
    return torch.stack([one.cos(), one * 0, one.sin(), one * 0])


def test_partial_width_leaves_the_rest() -> None:
    x = torch.randn(1, 2, 6, 8)
    turned = rotate(x, torch.arange(6), width=4)
    torch.testing.assert_close(turned[..., 4:], x[..., 4:], rtol=0, atol=0)
    torch.testing.assert_close(turned[..., :4], rotate(x[..., :4], torch.arange(6)))


def test_positions_may_differ_by_row() -> None:
    x = torch.randn(2, 1, 3, 4)
    places = torch.tensor([[0, 1, 2], [5, 6, 7]])
    torch.testing.assert_close(rotate(x, places)[1:], rotate(x[1:], places[1]))


@pytest.mark.parametrize("width", [3, 10])
def test_bad_width_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="rotary width"):
        rotate(torch.randn(1, 1, 2, 8), torch.arange(2), width=width)


@pytest.mark.parametrize("width", [4, 8])
def test_the_interleaved_layout_pairs_neighbours(width: int) -> None:
    x = torch.randn(2, 3, 6, 8)
    to_halves = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2), torch.arange(width, 8)])
    interleaved = rotate(x, torch.arange(6), width=width, interleaved=True)
    half = rotate(x[..., to_halves], torch.arange(6), width=width)
    torch.testing.assert_close(interleaved[..., to_halves], half)
