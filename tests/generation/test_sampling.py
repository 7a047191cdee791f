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
