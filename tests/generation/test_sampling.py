import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.generation.logits import keep_min_p, keep_top_k, keep_top_p, keep_typical
from performer_lm.generation.sampling import Sampler, draw


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
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
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


@pytest.mark.parametrize(("logit", "penalty", "chosen"), [(5.0, 1e39, 1), (-5.0, 1e300, 2), (5.0, 1e-300, 0)])
def test_the_strongest_penalties_keep_their_sense(logit: float, penalty: float, chosen: int) -> None:
    logits = torch.tensor([[logit, logit / 2, 0.0]])
    assert int(Sampler(repetition_penalty=penalty, top_k=1)(logits, seen=torch.tensor([[0]]))) == chosen


def test_draws_are_those_of_multinomial() -> None:
    for vocab in (1, 2, 257, 5000):
        probabilities = torch.randn(3, vocab).softmax(-1)
        for seed in range(5):
            wanted = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
            assert torch.equal(draw(probabilities, torch.Generator().manual_seed(seed)), wanted)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8, "min_p": 0.02, "typical_p": 0.9}])
def test_rows_with_seeds_of_their_own_are_drawn_as_alone(options: dict[str, Any]) -> None:
    logits, sampler = torch.randn(6, 30), Sampler(**options)
    together = sampler(logits, [torch.Generator().manual_seed(seed) for seed in range(6)])
    alone = [sampler(logits[seed : seed + 1], torch.Generator().manual_seed(seed)) for seed in range(6)]
    assert torch.equal(together, torch.cat(alone))


@given(vocab=st.integers(1, 12), p=st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_so_near_to_the_likeliest(vocab: int, p: float) -> None:
    logits = torch.randn(3, vocab, dtype=torch.float64)
    masses = logits.softmax(-1)
    assert kept(keep_min_p(logits, p)) == (masses >= p * masses.max(-1, keepdim=True).values).sum(-1).tolist()


@given(vocab=st.integers(1, 12), p=st.floats(0.01, 1.0))
def test_typical_tokens_are_the_nearest_to_the_entropy(vocab: int, p: float) -> None:
    logits = 3 * torch.randn(1, vocab, dtype=torch.float64)
    masses = logits.softmax(-1)[0]
    entropy = -sum(float(mass) * math.log(mass) for mass in masses)
    nearest = sorted(range(vocab), key=lambda token: abs(-math.log(masses[token]) - entropy))
    wanted, mass = set(), 0.0
    for token in nearest:
        if not wanted or mass < p - 1e-12:
            wanted.add(token)
        mass += float(masses[token])
    assert set(torch.isfinite(keep_typical(logits, p))[0].nonzero()[:, 0].tolist()) == wanted


@given(p=st.floats(1e-300, 1.0), q=st.floats(1e-300, 1.0), k=st.integers(1, 5), vocab=st.integers(1, 5))
def test_filters_one_after_another_leave_a_token(p: float, q: float, k: int, vocab: int) -> None:
    logits = 300 * torch.randn(4, vocab)
    drawn = Sampler(top_k=k, top_p=p, min_p=q, typical_p=p)(logits)
    assert ((drawn >= 0) & (drawn < vocab)).all()


def test_filters_act_in_order_of_temperature_top_k_top_p_min_p_typical_p() -> None:
    logits = torch.tensor([[4.0, 3.5, 3.0, 2.0, -1.0]])
    tempered = keep_typical(keep_min_p(keep_top_p(keep_top_k(logits / 2, 4), 0.9), 0.5), 0.6)
    sampler = Sampler(temperature=2.0, top_k=4, top_p=0.9, min_p=0.5, typical_p=0.6)
    seeds = range(200)
    drawn = [int(sampler(logits, torch.Generator().manual_seed(seed))) for seed in seeds]
    assert drawn == [int(draw(tempered.softmax(-1), torch.Generator().manual_seed(seed))) for seed in seeds]


def test_penalties_are_subtracted_for_each_time_and_once() -> None:
    logits, seen = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[0, 0, 1, 3, 0]])
    sampler = Sampler(frequency_penalty=0.5, presence_penalty=0.25, repetition_window=4)
    torch.testing.assert_close(sampler.adjust(logits, seen=seen), torch.tensor([[1.75, 1.25, 1.0, -0.75]]))
    mask = torch.tensor([[1, 0, 1, 1, 1]])
    torch.testing.assert_close(sampler.adjust(logits, seen=seen, mask=mask)[0, 0], torch.tensor(2.25))
    both = Sampler(repetition_penalty=2.0, frequency_penalty=1.0)
    torch.testing.assert_close(both.adjust(logits, seen=seen), torch.tensor([[-1.5, 0.0, 1.0, -1.0]]))


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3),
    pads=st.integers(0, 9),
    size=st.integers(1, 5),
)
def test_a_run_of_tokens_is_not_repeated(rows: list[list[int]], pads: int, size: int) -> None:
    tokens, logits = torch.tensor(rows), torch.randn(len(rows), 4)
    mask = torch.arange(9) >= pads
    left = Sampler(no_repeat_ngram_size=size).adjust(logits, seen=tokens, mask=mask.expand(len(rows), 9))
    for row, was, now in zip(rows, logits, left, strict=True):
        text = row[pads:]
        runs = {tuple(text[start : start + size]) for start in range(len(text) - size + 1)}
        begun = tuple(text[len(text) - size + 1 :])
        banned = {token for token in range(4) if len(begun) == size - 1 and (*begun, token) in runs}
        wanted = [-math.inf if token in banned and len(banned) < 4 else float(was[token]) for token in range(4)]
        assert now.tolist() == wanted


def test_bias_is_added_and_banned_tokens_never_come() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, 9.0, 1.0]])
    sampler = Sampler(temperature=0, banned_tokens=[1], logit_bias={2: 4.5, 0: -1})
    assert sampler.adjust(logits).tolist() == [[2.0, -math.inf, 5.5], [-1.0, -math.inf, 5.5]]
    assert sampler(logits).tolist() == [2, 2]
    drawn = Sampler(banned_tokens=[0, 2], no_repeat_ngram_size=1)(logits.repeat(50, 1), seen=torch.ones(100, 1).long())
    assert set(drawn.tolist()) == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_p": -0.1}, "min_p must be at least 0 and at most 1"),
        ({"typical_p": 0.0}, "typical_p must be above 0 and at most 1"),
        ({"typical_p": math.nan}, "typical_p must be a finite number"),
        ({"frequency_penalty": 2.5}, "frequency_penalty must be at least -2 and at most 2"),
        ({"presence_penalty": -math.inf}, "presence_penalty must be a finite number"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size must be at least 1"),
        ({"banned_tokens": [1, -1]}, "banned_tokens: a token's id must be a whole number from 0 on, got -1"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias: a token's id must be a whole number from 0 on, got 'a'"),
        ({"logit_bias": {1: 101}}, r"logit_bias\[1\] must be at least -100 and at most 100, got 101"),
        ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\] must be a finite number"),
    ],
)
def test_rules_outside_their_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)


def test_ids_must_be_those_of_the_vocabulary_and_not_all_banned() -> None:
    Sampler(banned_tokens=[0, 1], logit_bias={2: 1.0}).check(3)
    with pytest.raises(ValueError, match="banned_tokens: there is no token 3, the ids are 0 to 2"):
        Sampler(banned_tokens=[3]).check(3)
    with pytest.raises(ValueError, match="logit_bias: there is no token 7"):
        Sampler(logit_bias={7: 1.0}).check(3)
    with pytest.raises(ValueError, match="all 2 tokens are banned"):
        Sampler(banned_tokens=[0, 1, 1]).check(2)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"typical_p": 0.7}]
)
def test_frequencies_pass_a_chi_square_test(options: dict[str, Any]) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -0.5, 1.5])
    sampler = Sampler(**options)
    drawn = sampler(logits.expand(20_000, 5), torch.Generator().manual_seed(0)).bincount(minlength=5)
    left = logits / sampler.temperature
    for name, keep in (
        ("top_k", keep_top_k),
        ("top_p", keep_top_p),
        ("min_p", keep_min_p),
        ("typical_p", keep_typical),
    ):
        left = keep(left[None], options[name])[0] if name in options else left
    expected = 20_000 * left.softmax(0)
    assert not drawn[expected == 0].any()
    assert ((drawn - expected)[expected > 0] ** 2 / expected[expected > 0]).sum() < 18.5  # one in a thousand, at 4 free
