"""Seeds made of several integers are as far apart as random ones, and dropout drawn from hashes is like coins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.ops.hashing import keep_mask, mix_seed

CPU = torch.device("cpu")


def test_mix_seed_tells_order_and_neighbours_apart() -> None:
    seeds = {mix_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 8**3
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert mix_seed(-1, 0) != mix_seed(0, -1)


def keep(
    seed: int = 0, rate: float = 0.3, batch: int = 2, heads: int = 3, rows: range = range(200), cols: range = range(300)
):
    return keep_mask(seed, rate, batch, heads, rows, cols, device=CPU)


@given(seed=st.integers(-(2**70), 2**70), rate=st.sampled_from([0.01, 0.3, 0.5, 0.9]))
def test_the_keep_rate_is_what_was_asked_for(seed, rate):
    kept = keep(seed, rate).double()
    chance = 1 - rate
    # 5 standard errors: 30 examples of 7 means each are drawn, of which one in 75 runs would fall outside 4
    for dims in ((0, 1, 2, 3), (2, 3)):
        count = kept.numel() // kept.mean(dims).numel()
        error = (chance * rate / count) ** 0.5
        assert ((kept.mean(dims) - chance).abs() < 5 * error).all()


def test_the_rate_is_within_three_standard_errors_on_a_large_mask():
    kept = keep(batch=4, heads=4, rows=range(500), cols=range(500)).double()
    assert abs(kept.mean().item() - 0.7) < 3 * (0.21 / kept.numel()) ** 0.5


@given(start=st.integers(0, 150), stop=st.integers(151, 200), left=st.integers(0, 99), right=st.integers(100, 300))
def test_a_block_is_that_part_of_the_whole(start, stop, left, right):
    block = keep(rows=range(start, stop), cols=range(left, right))
    assert torch.equal(block, keep()[:, :, start:stop, left:right])


def test_rows_columns_heads_batch_and_seeds_are_independent():
    kept = keep(batch=4, heads=4, rows=range(400), cols=range(400)).double()
    other = keep(seed=1, batch=4, heads=4, rows=range(400), cols=range(400)).double()

    def correlation(one: torch.Tensor, two: torch.Tensor) -> float:
        return torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1].abs().item()

    tolerance = 4 / 400  # standard errors of a correlation over at least 400 x 400 coins
    for one, two in (
        (kept[:, :, 1:], kept[:, :, :-1]),  # rows
        (kept[..., 1:], kept[..., :-1]),  # columns
        (kept[:, 1:], kept[:, :-1]),  # heads
        (kept[1:], kept[:-1]),  # batch
        (kept[..., :192, :192], kept[..., 192:384, 192:384]),  # tiles
        (kept, kept.mT),  # a symmetric hash of i and j
        (kept, other),  # seeds
    ):
        assert correlation(one, two) < tolerance


def test_counts_per_row_and_column_scatter_as_coins_do():
    kept = keep(rows=range(1000), cols=range(1000)).double()
    for dim in (2, 3):
        assert kept.mean(dim).std().item() == pytest.approx((0.21 / 1000) ** 0.5, rel=0.1)


def test_the_global_generator_is_not_touched():
    before = torch.random.get_rng_state()
    keep()
    assert torch.equal(torch.random.get_rng_state(), before)
