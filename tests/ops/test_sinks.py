import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.ops.local import local_attention
from performer_lm.ops.softmax import exact_attention


def see_window_and_sinks(call, *, window, sinks):
    """Return which keys each query may see, by counting: `(b, 1, i, j)`."""
    batch, keys, queries = call["k"].shape[0], call["k"].shape[2], call["q"].shape[2]
    kept = call.get("key_mask", torch.ones(batch, keys) > 0).tolist()
    document = call.get("segments", torch.zeros(batch, keys, dtype=torch.long)).tolist()
    seen = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for row in range(batch):
        for i in range(queries):
            at = keys - queries + i
            for j in range(keys):
                apart = sum(kept[row][min(at, j) + 1 : max(at, j) + 1])
                older = sum(kept[row][x] and document[row][x] == document[row][j] for x in range(j))
                seen[row, 0, i, j] = apart < window or (j < at and older < sinks)
    return seen


@given(data=st.data(), window=st.integers(1, 6), sinks=st.integers(0, 3), causal=st.booleans())
def test_sinks_stay_in_sight(calls, agree, data, window, sinks, causal):
    call = data.draw(calls(("segments", "key_mask", "log_decay", "scale") if causal else ("segments", "key_mask")))
    queries = call["q"].shape[2]
    if not causal:
        call |= {name: call[name][:, :, :queries] for name in "kv"}
        call |= {name: call[name][:, :queries] for name in ("segments", "key_mask") if name in call}
    kept = call.get("key_mask", torch.ones(call["k"].shape[0], call["k"].shape[2]) > 0)[:, None, -queries:, None]
    call["causal"] = causal
    seen = see_window_and_sinks(call, window=window, sinks=sinks)
    agree(
        lambda **c: local_attention(**c, window=window, sinks=sinks).where(kept, 0.0),
        lambda **c: exact_attention(**c, mask=seen).where(kept, 0.0),
        call,
    )
