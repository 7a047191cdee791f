import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from performer_lm.attention.base import fork
from performer_lm.attention.exact import ExactAttention
from performer_lm.attention.kv_cache import KVCache

CPU = torch.device("cpu")


def empty(max_len: int, dtype: torch.dtype = torch.float32) -> KVCache:
    attention = ExactAttention(heads=2, key_heads=2, dim_head=3, dim_value=4, layer=0)
    return attention.init_state(2, max_len=max_len, device=CPU, dtype=dtype)


def draw(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 2, tokens, 3), torch.randn(2, 2, tokens, 4)


@given(lengths=st.lists(st.integers(1, 5), max_size=8), max_len=st.integers(0, 9))
def test_the_cache_holds_what_was_appended(lengths, max_len):
    cache, parts = empty(max_len), [draw(0)]
    for length in lengths:
        parts.append(draw(length))
        cache = cache.append(*parts[-1], mask=None, log_decay=None)
    k, v, mask, log_decay = cache.filled()
    assert torch.equal(k, torch.cat([part[0] for part in parts], dim=2))
    assert torch.equal(v, torch.cat([part[1] for part in parts], dim=2))
    assert mask is None
    assert log_decay is None
    assert cache.length == sum(lengths)


def test_it_writes_in_place_while_there_is_room_and_doubles_past_it():
    first = empty(4).append(*draw(3), mask=None, log_decay=None)
    second = first.append(*draw(1), mask=None, log_decay=None)
    assert second.k.data_ptr() == first.k.data_ptr()
    third = second.append(*draw(1), mask=None, log_decay=None)
    assert third.k.shape[2] == third.v.shape[2] == 8
    assert third.append(*draw(20), mask=None, log_decay=None).k.shape[2] == 32


def test_mask_and_decay_may_come_late_and_go_again():
    mask, decay = torch.tensor([[True], [False]]), torch.full((2, 2, 1), -0.5)
    cache = empty(2).append(*draw(2), mask=None, log_decay=None).append(*draw(1), mask=mask, log_decay=decay)
    _, _, kept, faded = cache.append(*draw(1), mask=None, log_decay=None).filled()
    assert kept.tolist() == [[True, True, True, True], [True, True, False, True]]
    assert faded[0, 0].tolist() == [0.0, 0.0, -0.5, 0.0]


def test_a_fork_does_not_share_memory():
    cache = empty(4).append(*draw(2), mask=None, log_decay=None)
    copy = fork(cache)
    before = copy.k.clone()
    cache.append(torch.full((2, 2, 1, 3), 9.0), torch.zeros(2, 2, 1, 4), mask=None, log_decay=None)
    assert torch.equal(copy.k[:, :, :2], before[:, :, :2])
    assert (copy.k[:, :, 2] != 9.0).any()


def test_the_cache_keeps_its_dtype():
    cache = empty(2, torch.bfloat16).append(*draw(3), mask=None, log_decay=None)
    assert cache.k.dtype == cache.v.dtype == torch.bfloat16


def test_half_precision_caches_serve_single_precision_queries():
    attention = ExactAttention(heads=2, key_heads=2, dim_head=3, dim_value=4, layer=0)
    k, v = draw(5)
    out, _ = attention.extend(torch.randn(2, 2, 5, 3), k, v, empty(5, torch.bfloat16))
    assert out.dtype == torch.float32


def test_heads_must_divide():
    with pytest.raises(ValueError, match=r"heads \(3\) must be a multiple of key_heads \(2\)"):
        ExactAttention(heads=3, key_heads=2, dim_head=3, dim_value=4, layer=0)
