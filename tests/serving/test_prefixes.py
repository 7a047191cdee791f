import pytest
import torch

from performer_lm.performer import PerformerState
from performer_lm.serving.prefixes import PrefixStore


def state(number: int) -> PerformerState:
    return PerformerState(torch.tensor([number]), (torch.full((1, 4), float(number)),))


def filled(capacity: int, *texts: list[int]) -> PrefixStore:
    store = PrefixStore(capacity=capacity)
    for number, ids in enumerate(texts):
        store.put(ids, torch.zeros(1, 2), state(number))
    return store


SIZE = 8 + 16 + 8  # of an entry's state and logits, without 8 for each id


def test_the_longest_text_that_a_prompt_begins_with_is_found() -> None:
    store = filled(10_000, [1], [1, 2, 3], [1, 2], [2, 1], [1, 2, 3, 5])
    found = store.find([1, 2, 3, 4])
    assert found is not None
    assert (found.tokens.tolist(), found.mask.all().item(), int(found.state.length)) == ([[1, 2, 3]], True, 1)
    assert store.find([3, 1]) is None
    assert (store.hits, store.misses, store.tokens_spared) == (1, 1, 3)
    whole = store.find([2, 1])
    assert whole is not None
    assert int(whole.state.length) == 3


def test_ids_are_told_apart_whatever_their_bytes() -> None:
    store = filled(10_000, [1, 256])
    assert store.find([1, 0, 256]) is None
    assert store.find([257, 0]) is None


def test_the_text_not_used_for_the_longest_goes_first() -> None:
    store = filled(3 * (SIZE + 8), [1], [2], [3])
    assert store.bytes == 3 * (SIZE + 8)
    assert store.find([1, 7]) is not None
    store.put([4], torch.zeros(1, 2), state(9))
    assert store.bytes == 3 * (SIZE + 8)
    assert [store.find([token]) is not None for token in (1, 2, 3, 4)] == [True, False, True, True]


def test_what_is_larger_than_the_store_is_not_kept_and_turns_nothing_out() -> None:
    store = filled(2 * (SIZE + 8), [1], [2], [3] * 20)
    assert (len(store), store.find([3] * 20)) == (2, None)


def test_what_is_found_is_a_copy_and_so_is_what_is_kept() -> None:
    store, own = PrefixStore(capacity=1000), state(1)
    store.put([1], torch.zeros(1, 2), own)
    own.branches[0].fill_(7)  # type: ignore[attr-defined]
    for _ in range(2):
        found = store.find([1])
        assert found is not None
        assert found.state.branches[0].tolist() == [[1.0] * 4]  # type: ignore[attr-defined]
        found.state.branches[0].fill_(9)  # type: ignore[attr-defined]
        found.logits.fill_(9)


def test_a_store_of_no_bytes_keeps_nothing_and_counts_nothing() -> None:
    store = filled(0, [1])
    assert (store.find([1]), len(store), store.hits, store.misses) == (None, 0, 0, 0)
    with pytest.raises(ValueError, match="capacity must be at least 0"):
        PrefixStore(capacity=-1)
