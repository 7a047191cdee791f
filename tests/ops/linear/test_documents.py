"""Bidirectional attention within documents equals its definition, by logarithms and by features as they are."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from performer_lm.ops.linear import bidirectional_linear_attention
from performer_lm.ops.maps import BlockMap, Exponential, Generalized, Taylor


def positive(w: Tensor) -> BlockMap:
    return Exponential((w,), scale=1.0, norm=0.5)


def relu(w: Tensor) -> BlockMap:
    return Generalized((w,), activation="relu", epsilon=0.0)


def taylor(w: Tensor) -> BlockMap:
    return Taylor((w,))


def definition(feature_map: BlockMap, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    def features(x: Tensor) -> Tensor:
        by_group = x.transpose(0, 1).flatten(1, 2)
        values, logs = feature_map(by_group)
        if logs is not None:
            gain = feature_map.gain(by_group)
            values = (logs if gain is None else logs + gain[..., None]).exp()
        assert values is not None
        return values.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)

    weights = torch.stack([features(part) for part in q.unflatten(1, (2, -1)).unbind(2)], 2)  # (b, g, r, n, m)
    scores = (weights @ features(k)[:, :, None].mT) * visible[:, None, None]
    mass = scores.sum(-1, keepdim=True)
    return (scores @ v[:, :, None] / mass.masked_fill(mass == 0, 1.0)).flatten(1, 2)


@pytest.mark.parametrize("make", [positive, relu, taylor])
@given(n=st.integers(1, 17), chunk_size=st.integers(1, 6), masked=st.booleans(), seed=st.integers(0, 2**31))
def test_documents_see_themselves_alone(make: Any, n: int, chunk_size: int, masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    given_ = [torch.randn(2, heads, n, width).double().requires_grad_() for heads, width in ((4, 3), (2, 3), (2, 5))]
    w = torch.randn(2, 6, 3).double().requires_grad_()
    segments = (torch.rand(2, n) > 0.7).cumsum(dim=-1)
    mask = torch.rand(2, n) > 0.3 if masked else None
    feature_map = make(w)
    out = bidirectional_linear_attention(
        *given_, segments, query_map=feature_map, key_map=feature_map, chunk_size=chunk_size, mask=mask
    )
    visible = segments[:, :, None] == segments[:, None, :]
    expected = definition(feature_map, *given_, visible if mask is None else visible & mask[:, None])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), [*given_, w]) for x in (out, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
