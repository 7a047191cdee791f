import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.windows import (
    IGNORE,
    _epoch,
    first_bytes,
    num_validation_windows,
    shift,
    validation_batch,
    window_batch,
    window_starts,
    windows_per_epoch,
)

sizes = st.integers(1, 12).flatmap(lambda context: st.tuples(st.just(context), st.integers(context + 1, 20 * context)))


def starts_of(num_ids: int, context: int, batch_size: int, steps: int) -> list[int]:
    parts = [window_starts(num_ids, seed=3, step=step, batch_size=batch_size, context=context) for step in range(steps)]
    return np.concatenate(parts).tolist()


@given(size=sizes, batch_size=st.integers(1, 30))
def test_each_epoch_is_all_windows_once_from_an_offset(size, batch_size):
    context, num_ids = size
    per_epoch = windows_per_epoch(num_ids, context=context)
    starts = starts_of(num_ids, context, batch_size, steps=-(-3 * per_epoch // batch_size))
    for epoch in range(3):
        ordered = sorted(starts[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert ordered == list(range(ordered[0], ordered[0] + per_epoch * context, context))
        assert 0 <= ordered[0] < context
        assert ordered[-1] + context + 1 <= num_ids


@given(size=sizes, batch_size=st.integers(1, 8), times=st.integers(1, 4))
def test_the_order_does_not_depend_on_the_batch_size(size, batch_size, times):
    context, num_ids = size
    together = starts_of(num_ids, context, batch_size * times, steps=3)
    assert together == starts_of(num_ids, context, batch_size, steps=3 * times)


def test_orders_and_offsets_differ_between_epochs_and_seeds():
    def starts(seed: int, step: int) -> list[int]:
        return window_starts(1000, seed=seed, step=step, batch_size=99, context=10).tolist()

    assert windows_per_epoch(1000, context=10) == 99
    orders = [starts(seed, step) for seed in range(3) for step in range(3)]
    assert len(set(map(tuple, orders))) == 9
    assert len({min(order) for order in orders}) > 3


def test_a_batch_is_contiguous_ids_and_leaves_the_global_generators_alone():
    ids = np.arange(5000, dtype=np.uint16)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batch = window_batch(ids, seed=1, step=7, batch_size=4, context=32)
    assert batch.shape == (4, 33)
    assert batch.dtype == torch.int64
    assert (batch.diff(dim=1) == 1).all()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_an_epoch_is_shuffled_once_however_many_batches_it_has():
    before = _epoch.cache_info().misses
    for step in range(200):  # of about 48,000 in the epoch
        window_starts(200_000_000, seed=1, step=step, batch_size=8, context=512)
    assert _epoch.cache_info().misses == before + 1


def test_too_few_ids_are_refused_with_both_counts():
    with pytest.raises(ValueError, match=r"812 ids are too few: one window needs 1025 \(context=1024\)"):
        window_starts(812, seed=0, step=0, batch_size=1, context=1024)


@given(num_ids=st.integers(2, 60), context=st.integers(1, 12), batch_size=st.integers(1, 5))
def test_validation_predicts_every_id_but_the_first_once(num_ids, context, batch_size):
    ids = np.arange(100, 100 + num_ids, dtype=np.uint16)
    batches = -(-num_validation_windows(num_ids, context=context) // batch_size)
    windows = torch.cat(
        [validation_batch(ids, index=index, batch_size=batch_size, context=context) for index in range(batches)]
    )
    assert windows.shape == (batches * batch_size, context + 1)
    inputs, targets = shift(windows)
    assert targets[targets != IGNORE].tolist() == ids[1:].tolist()
    assert inputs[targets != IGNORE].tolist() == ids[:-1].tolist()
    assert (inputs >= 0).all()


@given(lengths=st.lists(st.integers(0, 5), min_size=2, max_size=30), limit=st.integers(1, 60))
def test_the_validation_prefix_is_the_longest_within_its_bytes(lengths, limit):
    ids = np.array([index for index, length in enumerate(lengths) for _ in range(2 if length else 1)])
    table = np.array(lengths)
    table[1:][(table[1:] == 0) & (table[:-1] == 0)] = 1  # documents are not empty: no two ends in a row
    prefix = first_bytes(ids, table, limit=limit)
    assert prefix.tolist() == ids[: len(prefix)].tolist()
    assert table[prefix].sum() <= limit
    if len(prefix) < len(ids):
        assert table[ids[: len(prefix) + 1]].sum() > limit
