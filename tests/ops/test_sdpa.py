from hypothesis import given
from hypothesis import strategies as st

from performer_lm.ops.sdpa import sdpa_attention
from performer_lm.ops.softmax import exact_attention

OPTIONS = ("causal", "window", "mask", "key_mask", "segments", "log_decay", "scale")


@given(data=st.data())
def test_sdpa_equals_exact_for_every_option_it_has(calls, agree, data):
    agree(sdpa_attention, exact_attention, data.draw(calls(OPTIONS)))
