import pytest
import torch

from performer_lm.attention.exact import ExactAttention
from performer_lm.attention.flash_tiled import FlashTiledAttention

SHAPE = {"heads": 4, "key_heads": 2, "dim_head": 3, "dim_value": 5, "layer": 0}


@pytest.mark.parametrize("on_chip", [1, 50, 48 * 1024])
def test_it_equals_exact_whatever_its_tiles(on_chip):
    q, k, v = torch.randn(2, 4, 10, 3), torch.randn(2, 2, 10, 3), torch.randn(2, 2, 10, 5)
    options = {"causal": True, "mask": torch.rand(2, 10) < 0.7, "log_decay": -torch.rand(2, 2, 10)}
    attention = FlashTiledAttention(**SHAPE, on_chip=on_chip)
    torch.testing.assert_close(attention(q, k, v, **options), ExactAttention(**SHAPE)(q, k, v, **options))


def test_a_memory_of_nothing_is_refused_at_once():
    with pytest.raises(ValueError, match="on_chip must be at least 1, got 0"):
        FlashTiledAttention(**SHAPE, on_chip=0)
