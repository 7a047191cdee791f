import math

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from performer_lm.ops.softmax import exact_attention


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@given(data=st.data())
def test_exact_equals_sdpa(calls, agree, data):
    call = data.draw(calls(("mask", "bias", "scale")))
    if "mask" in call:  # SDPA has no zeros for a row that sees nothing: let each see its first key
        call["mask"] = call["mask"] | (torch.arange(call["k"].shape[2]) == 0)

    def sdpa(q, k, v, mask=None, bias=None, scale=None):
        terms = torch.zeros((), dtype=q.dtype) if bias is None else bias
        if mask is not None:
            terms = terms.expand(torch.broadcast_shapes(terms.shape, mask.shape)).masked_fill(~mask, -torch.inf)
        terms = terms.expand(*q.shape[:3], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=terms, scale=scale, enable_gqa=True)

    agree(exact_attention, sdpa, call)


@given(queries=st.integers(1, 9))
def test_causal_equals_sdpa_where_lengths_agree(agree, queries):
    q, k, v = (x.requires_grad_() for x in draw((2, 3, queries, 4), (2, 3, queries, 4), (2, 3, queries, 5)))
    agree(
        lambda **call: exact_attention(**call, causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        {"q": q, "k": k, "v": v},
    )


@given(
    data=st.data(), queries=st.integers(1, 7), older=st.integers(0, 4), window=st.integers(1, 8), causal=st.booleans()
)
def test_every_option_means_what_its_definition_says(data, queries, older, window, causal):
    """One query at a time, with Python loops and nothing shared with the code under test."""
    keys = queries + older
    q, k, v = draw((1, 1, queries, 3), (1, 1, keys, 3), (1, 1, keys, 2))
    coins = st.lists(st.booleans(), min_size=keys, max_size=keys)
    kept, starts = data.draw(coins), data.draw(coins)
    documents = [sum(starts[: j + 1]) for j in range(keys)]
    fades = [-0.1 * j if keep else 0.0 for j, keep in enumerate(kept)]
    options = {"log_decay": torch.tensor(fades, dtype=torch.float64)[None, None]} if causal else {}
    out = exact_attention(
        q,
        k,
        v,
        causal=causal,
        window=window,
        key_mask=torch.tensor([kept]),
        segments=torch.tensor([documents]),
        scale=0.7,
        **options,
    )
    for query in range(queries):
        place = older + query
        weights = {}
        for j in range(keys):
            distance = abs(sum(kept[: place + 1]) - sum(kept[: j + 1]))
            if not kept[j] or documents[j] != documents[place] or distance >= window or (causal and j > place):
                continue
            fade = sum(fades[j + 1 : place + 1]) if causal else 0.0
            weights[j] = math.exp(0.7 * float(q[0, 0, query] @ k[0, 0, j]) + fade)
        wanted = sum((weight * v[0, 0, j] for j, weight in weights.items()), torch.zeros(2, dtype=torch.float64))
        torch.testing.assert_close(out[0, 0, query], wanted / (sum(weights.values()) or 1.0))


def test_decay_stays_exact_on_a_long_strongly_fading_stream():
    q, k, v = (x.float() for x in draw((1, 1, 4000, 8), (1, 1, 4000, 8), (1, 1, 4000, 8)))
    log_decay = -10 * torch.rand(1, 1, 4000)
    whole = exact_attention(q, k, v, causal=True, log_decay=log_decay)
    # what is 60 tokens old weighs nothing: a short stream that starts late gives the same
    late = exact_attention(*(x[:, :, 1000:1100] for x in (q, k, v)), causal=True, log_decay=log_decay[..., 1000:1100])
    torch.testing.assert_close(whole[:, :, 1070:1100], late[:, :, 70:], atol=1e-5, rtol=1e-5)


def test_a_bias_of_minus_infinity_hides_even_a_whole_row():
    q, k, v = (x.requires_grad_() for x in draw((1, 1, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2)))
    bias = torch.zeros(3, 3, dtype=torch.float64)
    bias[0], bias[1, 2] = -torch.inf, -torch.inf
    out = exact_attention(q, k, v, bias=bias)
    torch.testing.assert_close(out, exact_attention(q, k, v, mask=bias == 0))
    assert (out[:, :, 0] == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_more_causal_queries_than_keys_see_nothing_at_first():
    q, k, v = draw((1, 1, 5, 2), (1, 1, 3, 2), (1, 1, 3, 2))
    out = exact_attention(q, k, v, causal=True)
    assert (out[:, :, :2] == 0).all()
    torch.testing.assert_close(out[:, :, 2:], exact_attention(q[:, :, 2:], k, v, causal=True))
