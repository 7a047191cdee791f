import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.ids import HostIds
from performer_lm.data.layouts import StreamLayout, stream_spans
from performer_lm.data.windows import (
    IGNORE,
    FiniteWindows,
    TextWindows,
    count_first,
    first_bytes,
    listed_windows,
    segments_of,
)
from performer_lm.objectives import shift


def held_out(ids: np.ndarray, context: int, lengths: np.ndarray | None = None) -> FiniteWindows:
    table = np.ones(int(ids.max()) + 1, dtype=np.int64) if lengths is None else lengths
    spans = stream_spans(len(ids), context=context)
    return listed_windows(HostIds(ids), spans, context=context, byte_lengths=table)


def test_rows_are_contiguous_ids_and_leave_the_global_generators_alone():
    windows = TextWindows(HostIds(np.arange(5000, dtype=np.uint16)), StreamLayout(5000, seed=1, context=32), context=32)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batch = windows.rows(np.arange(28, 32))
    assert batch.shape == (4, 33)
    assert batch.dtype == torch.int64
    assert (batch.diff(dim=1) == 1).all()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@given(num_ids=st.integers(2, 60), context=st.integers(1, 12), extra=st.integers(0, 5))
def test_validation_predicts_every_id_but_the_first_once(num_ids, context, extra):
    ids = np.arange(100, 100 + num_ids, dtype=np.uint16)
    windows = held_out(ids, context)
    rows = windows.rows(np.arange(len(windows) + extra))
    assert rows.shape == (len(windows) + extra, context + 1)
    inputs, targets = shift(rows)
    assert targets[targets != IGNORE].tolist() == ids[1:].tolist()
    assert inputs[targets != IGNORE].tolist() == ids[:-1].tolist()
    assert (inputs >= 0).all()


@given(documents=st.lists(st.integers(1, 6), min_size=1, max_size=8), before=st.integers(0, 3))
def test_segments_number_the_documents_from_their_separators_on(documents, before):
    ids = [1] * before + [token for length in documents for token in [9, *[2] * length]]
    wanted = [0] * before + [index + 1 for index, length in enumerate(documents) for _ in range(length + 1)]
    batch = torch.tensor([ids, ids[::-1]])
    assert segments_of(batch, 9)[0].tolist() == wanted
    assert (segments_of(batch, 9).diff(dim=1) >= 0).all()


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


@given(num_ids=st.integers(2, 3000), context=st.integers(1, 9), limit=st.integers(1, 2000))
def test_the_first_windows_are_as_many_as_fit_into_their_bytes(num_ids, context, limit):
    table = np.array([0, 1, 2, 7])
    windows = held_out(np.random.default_rng(num_ids).integers(0, 4, num_ids), context, table)
    count = count_first(windows, limit=limit)
    targets = shift(windows.rows(np.arange(len(windows))))[1].numpy()
    sums = np.where(targets == IGNORE, 0, table[np.maximum(targets, 0)]).sum(1).cumsum()
    assert count == max(1, int((sums <= limit).sum()))


def test_windows_gathered_on_a_device_are_the_same_bit_for_bit():
    ids = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)
    training = TextWindows(HostIds(ids), StreamLayout(5000, seed=1, context=32), context=32)
    for windows in (training, held_out(ids, 32)):
        resident, places = windows.to(torch.device("cpu")), np.arange(0, 400, 7)
        assert type(resident) is type(windows)
        assert torch.equal(resident.rows(places), windows.rows(places))
        assert resident.to(torch.device("meta")).rows(places).device.type == "meta"
    assert np.array_equal(held_out(ids, 32).to(torch.device("cpu")).byte_lengths, held_out(ids, 32).byte_lengths)
