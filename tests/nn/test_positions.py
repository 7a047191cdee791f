import pytest
import torch

from performer_lm.nn.branch import TokenInfo
from performer_lm.nn.positions import (
    AbsolutePositions,
    AxialPositions,
    LearnedPositions,
    NoAbsolutePositions,
    NoPositions,
    Rotary,
    SinusoidalPositions,
)
from performer_lm.ops.rotary import rotate


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_both_by_position(interleaved: bool) -> None:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    places, options = torch.arange(5)[None], {"base": 100.0, "width": 4, "interleaved": interleaved}
    turned_q, turned_k = Rotary(dim_head=8, **options)(q, k, places)
    torch.testing.assert_close(turned_q, rotate(q, places, **options))
    torch.testing.assert_close(turned_k, rotate(k, places, **options))


def test_no_positions_change_nothing() -> None:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    assert NoPositions(dim_head=8)(q, k, torch.arange(5)[None]) == (q, k)
    assert NoAbsolutePositions(8)(q, torch.arange(5)[None]) is q


@pytest.mark.parametrize("options", [{"width": 3}, {"width": 10}, {"width": 0}, {"base": 0.0}])
def test_rotations_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"(width|base) must be"):
        Rotary(dim_head=8, **options)


def added(scheme: AbsolutePositions, places: torch.Tensor, dim: int = 6) -> torch.Tensor:
    for parameter in scheme.parameters():
        torch.nn.init.normal_(parameter)
    return scheme(torch.zeros(*places.shape, dim), places).detach()


def test_sinusoids_are_the_papers() -> None:
    places = torch.tensor([[0, 1, 7]])
    found = added(SinusoidalPositions(6), places)
    for pair in range(3):
        angle = places / 10_000.0 ** (2 * pair / 6)
        torch.testing.assert_close(found[..., pair], angle.sin())
        torch.testing.assert_close(found[..., pair + 3], angle.cos())


def test_a_place_has_its_vector_wherever_its_token_lies() -> None:
    for scheme in (LearnedPositions(6, max_len=12), AxialPositions(6, shape=[3, 4])):
        found = added(scheme, torch.arange(12)[None])
        assert len(found[0].unique(dim=0)) == 12
        shuffled = torch.tensor([[4, 0, 11, -1], [7, 7, 1, 2]])
        torch.testing.assert_close(
            scheme(torch.zeros(2, 4, 6), shuffled)[shuffled >= 0], found[0, shuffled[shuffled >= 0]]
        )
        assert scheme.max_len == 12


def test_axial_places_are_a_row_and_a_column() -> None:
    scheme = AxialPositions(6, shape=[3, 4])
    found = added(scheme, torch.arange(12)[None])[0]
    torch.testing.assert_close(found.reshape(3, 4, 6), (scheme.rows[:, None] + scheme.columns[None]).detach())


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="even dim, got 5"):
        SinusoidalPositions(5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LearnedPositions(4, max_len=0)
    with pytest.raises(ValueError, match=r"two sizes, \[rows, columns\], got \[3\]"):
        AxialPositions(4, shape=[3])
    with pytest.raises(ValueError, match=r"shape\[1\] must be at least 1, got 0"):
        AxialPositions(4, shape=[3, 0])


def test_places_count_real_tokens_of_their_own_document() -> None:
    x = torch.zeros(1, 8, 2)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1]]).bool()
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    assert TokenInfo.of(x, None).places.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert TokenInfo.of(x, mask, None).places[mask].tolist() == [0, 1, 2, 3, 4]
    assert TokenInfo.of(x, None, segments).places.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert TokenInfo.of(x, mask, segments).places[mask].tolist() == [0, 1, 0, 0, 1]
