from hypothesis import given
from hypothesis import strategies as st

from performer_lm.ops.chunked import chunked_attention
from performer_lm.ops.softmax import exact_attention


@given(data=st.data(), rows=st.integers(1, 20), cols=st.integers(1, 20))
def test_chunked_equals_exact_for_every_option_and_any_chunks(calls, agree, data, rows, cols):
    call = data.draw(calls())
    agree(chunked_attention, exact_attention, call, query_chunk_size=rows, key_chunk_size=cols)
