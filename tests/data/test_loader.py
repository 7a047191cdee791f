import gc
import multiprocessing
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from performer_lm.data.ids import HostIds
from performer_lm.data.layouts import StreamLayout, stream_spans
from performer_lm.data.loader import BatchShare, RemainingIndices, TrainBatches, TrainLoader, ValidationBatches
from performer_lm.data.windows import IGNORE, FiniteWindows, TextWindows, listed_windows
from performer_lm.objectives import shift

IDS = np.arange(1000, dtype=np.uint16)
counts = st.integers(1, 4)


def windows(context: int = 8, seed: int = 0) -> TextWindows:
    return TextWindows(HostIds(IDS), StreamLayout(len(IDS), seed=seed, context=context), context=context)


def held_out(num_ids: int) -> FiniteWindows:
    spans = stream_spans(num_ids, context=10)
    lengths = np.ones(len(IDS), dtype=np.int64)
    return listed_windows(HostIds(IDS[:num_ids]), spans, context=10, byte_lengths=lengths)


def shares(micro_batch: int, accumulation: int, ranks: int) -> list[BatchShare]:
    size = micro_batch * accumulation * ranks
    return [BatchShare(batch_size=size, accumulation=accumulation, ranks=ranks, rank=rank) for rank in range(ranks)]


def loader(*, steps: int = 6, accumulation: int = 2, done: int = 0, **options) -> TrainLoader:
    share = BatchShare(batch_size=4, accumulation=accumulation, ranks=1, rank=0)
    batches = TrainBatches(windows(), share, steps=steps)
    return TrainLoader(batches, accumulation=accumulation, done=lambda: done, **{"num_workers": 0, **options})


@given(micro_batch=counts, accumulation=counts, ranks=counts)
def test_ranks_and_accumulation_share_out_the_global_batch(micro_batch, accumulation, ranks):
    all_windows = windows(context=10, seed=7)
    parts = [TrainBatches(all_windows, share, steps=3) for share in shares(micro_batch, accumulation, ranks)]
    assert {len(batches) for batches in parts} == {3 * accumulation}
    for step in range(3):
        size = micro_batch * accumulation * ranks
        wanted = all_windows.rows(step * size + np.arange(size))
        got = [batches[step * accumulation + part] for part in range(accumulation) for batches in parts]
        assert torch.equal(torch.cat(got), wanted)


@given(micro_batch=counts, ranks=counts, num_ids=st.integers(2, 200))
def test_ranks_share_out_validation_with_equal_lengths(micro_batch, ranks, num_ids):
    parts = [ValidationBatches(held_out(num_ids), share) for share in shares(micro_batch, 1, ranks)]
    (length,) = {len(batches) for batches in parts}
    rows = torch.cat([batches[index] for index in range(length) for batches in parts])
    targets = shift(rows)[1]
    assert targets[targets != IGNORE].tolist() == list(range(1, num_ids))


def test_a_batch_that_does_not_divide_is_refused_with_all_numbers():
    share = BatchShare(batch_size=8, accumulation=3, ranks=2, rank=0)
    with pytest.raises(ValueError, match=r"\(8\) must be a multiple of ranks \(2\) x trainer.acc.* \(3\)"):
        share.check()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_where_its_trainer_stood(num_workers):
    whole = list(loader())
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(loader(done=5).state_dict())
    assert len(resumed) == len(whole) == 12
    assert torch.equal(torch.stack(list(resumed)), torch.stack(whole[5:]))


def test_another_accumulation_is_refused_on_resume():
    with pytest.raises(ValueError, match=r"accumulate_grad_batches \(1\) must stay .* \(2\)"):
        loader(accumulation=1).load_state_dict(loader(accumulation=2).state_dict())


def test_positions_are_what_a_trainer_with_several_ranks_leaves_alone():
    positions = RemainingIndices(TrainBatches(windows(), shares(1, 1, 1)[0], steps=4))
    assert isinstance(positions, torch.utils.data.DistributedSampler)
    positions.set_epoch(3)
    assert list(positions) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("start_method", "workers"),
    [("fork", 1), ("fork", 2), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))],
)
def test_however_workers_start_the_order_is_the_same_and_none_is_left(tmp_path, start_method, workers):
    path = tmp_path / "ids.bin"
    IDS.tofile(path)
    mapped = HostIds(np.memmap(path, dtype=np.uint16, mode="r"))
    batches = TrainBatches(
        TextWindows(mapped, StreamLayout(len(IDS), seed=0, context=8), context=8),
        BatchShare(batch_size=4, accumulation=2, ranks=1, rank=0),
        steps=6,
    )
    wanted = torch.stack(list(loader()))
    options = {"num_workers": workers, "start_method": start_method}
    assert torch.equal(torch.stack(list(TrainLoader(batches, accumulation=2, done=lambda: 0, **options))), wanted)
    persistent = DataLoader(
        batches,
        batch_size=None,
        sampler=RemainingIndices(batches),
        num_workers=workers,
        multiprocessing_context=start_method,
        persistent_workers=True,
    )
    for _ in range(2):
        assert torch.equal(torch.stack(list(persistent)), wanted)
    cast(Any, persistent)._iterator._shutdown_workers()  # there is no public way to end them before it is collected
    del persistent
    assert multiprocessing.active_children() == []


def test_a_loader_that_is_left_in_the_middle_leaves_no_process():
    running = iter(loader(num_workers=2, steps=1000))
    next(running)
    assert len(multiprocessing.active_children()) == 2
    del running
    gc.collect()
    assert multiprocessing.active_children() == []
