import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.ids import IGNORE, HostIds, ResidentIds, Spans


def spans_of(pairs: list[tuple[int, int]]) -> Spans:
    starts, lengths = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Spans(starts.copy(), np.minimum(starts + lengths, 300))


spans = st.lists(st.tuples(st.integers(0, 299), st.integers(0, 6)), max_size=8).map(spans_of)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
@given(spans=spans)
def test_ids_on_a_device_give_what_ids_on_the_host_give(dtype, spans):
    ids = np.random.default_rng(0).integers(0, min(2**31, np.iinfo(dtype).max), 300, endpoint=True).astype(dtype)
    host, resident = HostIds(ids), ResidentIds(ids, device=torch.device("cpu"))
    rows = host.windows(spans, context=5)
    assert rows.dtype == torch.int64
    assert torch.equal(resident.windows(spans, context=5), rows)
    assert len(host) == len(resident) == 300
    for row, start, stop in zip(rows.tolist(), spans.starts, spans.stops, strict=True):
        assert row == [*ids[start:stop].tolist(), *[IGNORE] * (6 - (stop - start))]


def test_gathering_on_a_device_waits_for_nothing():
    ids = ResidentIds(np.arange(100, dtype=np.uint16), device=torch.device("meta"))
    for stops in ([9, 14], [5, 14]):
        rows = ids.windows(Spans(np.array([3, 8]), np.array(stops)), context=5)
        assert rows.shape == (2, 6)
        assert rows.device.type == "meta"


def test_mapped_ids_travel_as_the_name_of_their_file(tmp_path):
    path = tmp_path / "ids.bin"
    np.arange(100_000, dtype=np.uint16).tofile(path)
    ids = HostIds(np.memmap(path, dtype=np.uint16, mode="r")[:90_000])
    sent = pickle.dumps(ids)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    where = Spans(np.array([89_990]), np.array([89_996]))
    assert len(again) == 90_000
    assert torch.equal(again.windows(where, context=5), ids.windows(where, context=5))
    in_memory = pickle.loads(pickle.dumps(HostIds(np.arange(9))))
    assert in_memory.windows(Spans(np.array([2]), np.array([4])), context=1).tolist() == [[2, 3]]
