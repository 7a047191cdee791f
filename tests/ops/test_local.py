import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.ops.local import local_attention
from performer_lm.ops.softmax import exact_attention


@given(data=st.data(), window=st.integers(1, 20))
def test_local_equals_exact_with_a_window(calls, agree, data, window):
    call = data.draw(calls(("segments", "log_decay", "scale"))) | {"causal": True}
    agree(local_attention, lambda **c: exact_attention(**c, window=window), call, window=window)


@given(data=st.data(), window=st.integers(1, 20), causal=st.booleans())
def test_windows_count_kept_keys_wherever_the_masked_ones_stand(calls, agree, data, window, causal):
    call = data.draw(calls(("segments", "key_mask", "log_decay") if causal else ("segments", "key_mask")))
    queries = call["q"].shape[2]
    if not causal:
        call |= {name: call[name][:, :, :queries] for name in "kv"}
        call |= {name: call[name][:, :queries] for name in ("segments", "key_mask") if name in call}
    kept = call.get("key_mask", torch.ones(call["k"].shape[0], call["k"].shape[2]) > 0)[:, None, -queries:, None]

    def attend(attention, **call):
        return attention(**call, window=window).where(kept, 0.0)

    call["causal"] = causal
    agree(lambda **c: attend(local_attention, **c), lambda **c: attend(exact_attention, **c), call)


def test_lengths_that_do_not_fit_are_refused():
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match="as many queries as keys, got 3 and 5"):
        local_attention(q, k, k, window=2)
    with pytest.raises(ValueError, match="at most as many queries as keys, got 5 and 3"):
        local_attention(k, q, q, window=2, causal=True)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        local_attention(q, q, q, window=0)
    with pytest.raises(ValueError, match="sinks must be at least 0, got -1"):
        local_attention(q, q, q, window=2, sinks=-1)
