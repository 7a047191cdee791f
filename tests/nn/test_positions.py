import pytest
import torch

from performer_lm.nn.positions import NoPositions, Rotary
from performer_lm.ops.rotary import rotate


def test_rotary_turns_both_by_position() -> None:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    places = torch.arange(5)[None]
    turned_q, turned_k = Rotary(dim_head=8, base=100.0, width=4)(q, k, places)
    torch.testing.assert_close(turned_q, rotate(q, places, base=100.0, width=4))
    torch.testing.assert_close(turned_k, rotate(k, places, base=100.0, width=4))


def test_no_positions_changes_nothing() -> None:
    q, k = torch.randn(2, 1, 2, 3, 4)
    assert NoPositions(dim_head=4)(q, k, torch.arange(3)[None]) == (q, k)


@pytest.mark.parametrize("arguments", [{"dim_head": 7}, {"dim_head": 8, "width": 3}, {"dim_head": 8, "width": 10}])
def test_odd_or_large_width_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rotary width must be even"):
        Rotary(**arguments)
