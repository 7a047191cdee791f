"""Pairs of queries and keys give the same weights, however they are multiplied and cut into blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from performer_lm.attention.favor import FavorAttention
from performer_lm.evaluation.approximation import pairs
from performer_lm.evaluation.approximation.pairs import Block, Pairs

Build = Callable[..., FavorAttention]
Inputs = Callable[..., tuple[Tensor, Tensor, Tensor]]


def compare(attention: FavorAttention, q: Tensor, k: Tensor, **more: Any) -> Block:
    with torch.no_grad():
        found = list(Pairs(attention, q, k, causal=True, **more).blocks())
    visible = [block.visible.expand_as(block.exact) for block in found]
    parts = [block._replace(visible=seen) for block, seen in zip(found, visible, strict=True)]
    return Block(*(torch.cat(each, dim=2) for each in zip(*parts, strict=True)))


@pytest.mark.parametrize("features", ["positive", "centred", "relu"])
@pytest.mark.parametrize("std", [0.7, 3.0])
def test_matrix_products_give_what_pairs_give_one_by_one(
    build: Build, inputs: Inputs, features: str, std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, (q, k, _) = build(features).double(), (x.double() for x in inputs(std))
    fast = compare(attention, q, k)
    monkeypatch.setattr(Pairs, "_products", Pairs._products_one_by_one)
    for one, other in zip(fast, compare(attention, q, k), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_vectors_too_far_apart_for_one_scale_are_multiplied_one_by_one(
    build: Build, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, _ = (x.double() for x in inputs(60.0))
    calls: list[slice] = []
    alone = Pairs._products_one_by_one

    def count(self: Pairs, rows: slice) -> Any:
        calls.append(rows)
        return alone(self, rows)

    monkeypatch.setattr(Pairs, "_products_one_by_one", count)
    found = compare(build().double(), q, k)
    assert calls
    assert all(part.isfinite().all() for part in found)
    torch.testing.assert_close(found.implied.sum(dim=-1), torch.ones_like(found.implied[..., 0]))


def test_blocks_change_nothing(build: Build, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = inputs()
    more = {"mask": torch.rand(2, 12) > 0.3, "log_decay": -torch.rand(2, 2, 12)}
    whole = compare(build(), q, k, **more)
    monkeypatch.setattr(pairs, "BLOCK", 1000)
    for one, other in zip(compare(build(), q, k, **more), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("queries", "rows"), [(None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), (3, [3, 7, 11]), (1, [11])]
)
def test_chosen_queries_are_evenly_spaced_and_end_with_the_last(
    build: Build, inputs: Inputs, queries: int | None, rows: list[int]
) -> None:
    q, k, _ = inputs()
    assert Pairs(build(), q, k, causal=True, queries=queries).rows.tolist() == rows
    whole = compare(build(), q, k)
    for one, other in zip(compare(build(), q, k, queries=queries), whole, strict=True):
        torch.testing.assert_close(one, other[:, :, rows], atol=1e-5, rtol=1e-5)
