import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.layouts import (
    BLOCK,
    DocumentLayout,
    ListedLayout,
    MixtureLayout,
    StreamLayout,
    document_bounds,
    document_spans,
    shares,
    stream_spans,
    windows_per_epoch,
)

sizes = st.integers(1, 12).flatmap(lambda context: st.tuples(st.just(context), st.integers(context + 1, 20 * context)))


def starts_of(num_ids: int, context: int, count: int, *, seed: int = 3, batch_size: int = 1) -> list[int]:
    layout = StreamLayout(num_ids, seed=seed, context=context)
    batches = [np.arange(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    return np.concatenate([layout.spans(places).starts for places in batches]).tolist()


@given(size=sizes, batch_size=st.integers(1, 30))
def test_each_epoch_is_all_windows_once_from_an_offset(size, batch_size):
    context, num_ids = size
    per_epoch = windows_per_epoch(num_ids, context=context)
    starts = starts_of(num_ids, context, 3 * per_epoch, batch_size=batch_size)
    for epoch in range(3):
        ordered = sorted(starts[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert ordered == list(range(ordered[0], ordered[0] + per_epoch * context, context))
        assert 0 <= ordered[0] < 2 * context
        assert ordered[-1] + context + 1 <= num_ids


@given(size=sizes)
def test_every_id_has_its_turn_as_an_input_and_as_a_target(size):
    context, num_ids = size
    starts = np.array(starts_of(num_ids, context, 400 * windows_per_epoch(num_ids, context=context)))
    inputs = set((np.unique(starts)[:, None] + np.arange(context)).flatten().tolist())
    assert inputs == set(range(num_ids - 1))


@given(size=sizes, batch_size=st.integers(1, 40), places=st.lists(st.integers(0, 200), max_size=9))
def test_a_window_does_not_depend_on_what_was_asked_with_or_before_it(size, batch_size, places):
    context, num_ids = size
    alone = starts_of(num_ids, context, 201)
    assert starts_of(num_ids, context, 201, batch_size=batch_size) == alone
    layout = StreamLayout(num_ids, seed=3, context=context)
    assert layout.spans(np.array(places, dtype=np.int64)).starts.tolist() == [alone[place] for place in places]
    again = pickle.loads(pickle.dumps(layout))
    assert again.spans(np.arange(201)).starts.tolist() == alone


def test_orders_and_offsets_differ_between_epochs_and_seeds():
    assert windows_per_epoch(1000, context=10) == 99
    starts = {seed: np.reshape(starts_of(1000, 10, 297, seed=seed), (3, 99)) for seed in range(3)}
    orders = [tuple(epoch) for epochs in starts.values() for epoch in epochs]
    assert len(set(orders)) == 9
    assert len({min(order) for order in orders}) > 3


def test_an_epoch_is_drawn_once_however_many_batches_it_has(monkeypatch):
    layout, drawn = StreamLayout(200_000, seed=1, context=512), []
    draw = layout._draw
    monkeypatch.setattr(layout, "_draw", lambda epoch: drawn.append(epoch) or draw(epoch))
    for step in range(200):
        layout.spans(step * 8 + np.arange(8))
    assert drawn == [0, 1, 2, 3, 4]


def test_too_few_ids_are_refused_with_both_counts():
    with pytest.raises(ValueError, match=r"812 ids are too few: one window needs 1025 \(context=1024\)"):
        StreamLayout(812, seed=0, context=1024)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), context=st.integers(1, 6))
def test_documents_are_cropped_to_a_window_each(lengths, context):
    bounds = np.cumsum([0, *(length + 1 for length in lengths)])
    wanted = {(start, min(stop + 1, start + context + 1)) for start, stop in pairwise(bounds)}
    layout, count = DocumentLayout(bounds, seed=0, context=context), len(lengths)
    for epoch in range(2):
        spans = layout.spans(epoch * count + np.arange(count))
        assert set(zip(spans.starts, spans.stops, strict=True)) == wanted
    held_out = document_spans(bounds, context=context)
    assert list(zip(*held_out, strict=True)) == sorted(wanted)


def test_bounds_are_found_part_by_part(monkeypatch):
    monkeypatch.setattr("performer_lm.data.layouts.AT_ONCE", 7)
    ids = np.random.default_rng(0).integers(0, 4, 100)
    assert document_bounds(ids, end_id=3).tolist() == np.flatnonzero(ids == 3).tolist()
    assert document_bounds(ids[:0], end_id=3).tolist() == []


def test_a_stream_may_begin_anywhere_in_the_array():
    shuffled = [StreamLayout(200, context=7, first=first, seed=3).spans(np.arange(50)) for first in (1000, 0)]
    in_order = [stream_spans(200, context=7, first=first) for first in (1000, 0)]
    for there, here in (shuffled, in_order):
        assert (there.starts - here.starts == 1000).all()
        assert (there.stops - here.stops == 1000).all()


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@given(weights=weights)
def test_shares_are_the_nearest_whole_numbers_that_add_up(weights):
    if min(weights) / sum(weights) < 1 / BLOCK:
        return
    counts = shares(weights)
    assert counts.sum() == BLOCK
    assert (np.abs(counts - BLOCK * np.array(weights) / sum(weights)) < 1).all()


def test_weights_that_are_no_shares_are_refused():
    for wrong in ([1.0, 0.0], [1.0, -1.0], [1.0, 1e-5], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match=r"data\.weights \(.*\) must each be at least 1/2000 of all"):
            shares(wrong)


@given(weights=weights, batch_size=st.integers(1, 700))
def test_a_mixture_gives_each_corpus_its_share_and_its_own_order(weights, batch_size):
    if min(weights) / sum(weights) < 1 / BLOCK:
        return
    parts = [StreamLayout(500, seed=3, context=7, first=1000 * index) for index in range(len(weights))]
    mixture = MixtureLayout(parts, weights, seed=5)
    spans = [mixture.spans(np.arange(first, min(first + batch_size, 2500))) for first in range(0, 2500, batch_size)]
    starts = np.concatenate([each.starts for each in spans])
    counts = np.bincount(starts[: 2 * BLOCK] // 1000, minlength=len(weights))
    assert (counts == 2 * shares(weights)).all()
    for index, part in enumerate(parts):
        mine = starts[starts // 1000 == index]
        assert mine.tolist() == part.spans(np.arange(len(mine))).starts.tolist()
    if len(weights) > 1:
        assert starts[:BLOCK].tolist() != MixtureLayout(parts, weights, seed=6).spans(np.arange(BLOCK)).starts.tolist()


def test_listed_windows_lie_one_part_after_the_other():
    parts = [stream_spans(20, context=6), document_spans(np.array([30, 40]), context=6), stream_spans(1, context=6)]
    whole = ListedLayout(*parts)
    spans = whole.spans(np.arange(5))
    assert len(whole) == 5
    assert spans.starts.tolist() == [0, 6, 12, 18, 30]
    assert (spans.stops - spans.starts).tolist() == [7, 7, 7, 2, 7]
