import pytest
import torch

from performer_lm.attention.chunked import ChunkedAttention
from performer_lm.attention.exact import ExactAttention

SHAPE = {"heads": 4, "key_heads": 2, "dim_head": 3, "dim_value": 5, "layer": 0}


@pytest.mark.parametrize(("rows", "cols"), [(None, None), (1, 1), (4, 3), (3, None), (None, 100)])
def test_it_equals_exact_whatever_its_chunks(rows, cols):
    q, k, v = torch.randn(2, 4, 10, 3), torch.randn(2, 2, 10, 3), torch.randn(2, 2, 10, 5)
    options = {"causal": True, "mask": torch.rand(2, 10) < 0.7, "log_decay": -torch.rand(2, 2, 10)}
    attention = ChunkedAttention(**SHAPE, query_chunk_size=rows, key_chunk_size=cols)
    torch.testing.assert_close(attention(q, k, v, **options), ExactAttention(**SHAPE)(q, k, v, **options))


@pytest.mark.parametrize("name", ["query_chunk_size", "key_chunk_size"])
def test_a_chunk_of_nothing_is_refused_at_once(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ChunkedAttention(**SHAPE, **{name: 0})
