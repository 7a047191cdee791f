import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.generation.sampling import Sampler, keep_top_k, keep_top_p


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits).sum(-1).tolist()


def test_zero_temperature_is_greedy() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.0], [5.0, -1.0, 4.9]])
    assert Sampler(temperature=0)(logits).tolist() == [1, 0]


@given(vocab=st.integers(1, 12), k=st.integers(1, 20))
def test_top_k_keeps_k(vocab: int, k: int) -> None:
    logits = torch.randperm(vocab).float()[None]
    assert kept(keep_top_k(logits, min(k, vocab))) == [min(k, vocab)]
    assert 0 <= int(Sampler(top_k=k)(logits)) < vocab


@given(vocab=st.integers(1, 12), p=st.floats(0.01, 1.0))
def test_nucleus_is_the_smallest_set_of_its_mass(vocab: int, p: float) -> None:
    logits = torch.randn(1, vocab, dtype=torch.float64)
    masses = logits.softmax(-1).sort(descending=True).values.cumsum(-1)[0]
    wanted = 1 + int((masses < p - 1e-12).sum())
    assert kept(keep_top_p(logits, p)) == [min(wanted, vocab)]


def test_frequencies_follow_the_tempered_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    drawn = Sampler(temperature=0.5)(logits.expand(20_000, 3), generator)
    share = drawn.bincount(minlength=3) / 20_000
    torch.testing.assert_close(share, (2 * logits).softmax(0), atol=0.011, rtol=0)  # three standard errors


def test_same_seed_same_draw() -> None:
    logits = torch.randn(4, 50)
    one, two = (Sampler()(logits, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be within"),
        ({"top_p": 1.5}, "top_p must be within"),
    ],
)
def test_values_outside_their_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)


def test_a_penalty_makes_what_was_lately_seen_less_likely_whatever_its_sign() -> None:
    sampler = Sampler(temperature=0, repetition_penalty=2.0, repetition_window=3)
    logits = torch.tensor([[3.0, 2.0, 1.0, -1.0], [-1.0, -1.5, -5.0, -6.0]])
    seen = torch.tensor([[3, 0, 0, 0], [0, 1, 0, 1]])
    assert sampler(logits, seen=seen).tolist() == [1, 0]  # 3 becomes 1.5; -1 and -1.5 become -2 and -3
    assert sampler(logits, seen=seen[:, :1]).tolist() == [0, 1]  # the first row's 3 was never a candidate
    assert sampler(logits, seen=seen, mask=torch.zeros(2, 4, dtype=torch.bool)).tolist() == [0, 0]
    assert sampler(logits).tolist() == [0, 0]


def test_a_penalty_looks_so_far_back() -> None:
    sampler = Sampler(temperature=0, repetition_penalty=9.0, repetition_window=2)
    logits = torch.tensor([[3.0, 2.0]])
    assert sampler(logits, seen=torch.tensor([[0, 1, 1]])).tolist() == [0]
    assert sampler(logits, seen=torch.tensor([[1, 0, 1]])).tolist() == [0]  # both, alike


@pytest.mark.parametrize("options", [{"repetition_penalty": 0.0}, {"repetition_window": 0}])
def test_penalties_outside_their_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"repetition_\w+ must be"):
        Sampler(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}, {"repetition_penalty": 2.0}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_said_to_be(options: dict[str, Any], bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0]])
    with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
        Sampler(**options)(logits, seen=torch.tensor([[0], [1]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{"temperature": 1e-45}, {"temperature": 1e-300}, {"top_p": 1e-300}])
def test_the_least_temperature_and_mass_are_greedy(dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits = torch.tensor([[0.5, 3.0, -2.0], [-700.0, 800.0, 900.0]], dtype=dtype)
    assert [Sampler(**options)(logits).tolist() for _ in range(5)] == [[1, 2]] * 5


@pytest.mark.parametrize(("logit", "penalty", "chosen"), [(5.0, 1e39, 1), (-5.0, math.inf, 2), (5.0, 1e-300, 0)])
def test_the_strongest_penalties_keep_their_sense(logit: float, penalty: float, chosen: int) -> None:
    logits = torch.tensor([[logit, logit / 2, 0.0]])
    assert int(Sampler(repetition_penalty=penalty, top_k=1)(logits, seen=torch.tensor([[0]]))) == chosen
