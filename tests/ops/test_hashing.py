"""Seeds made of several integers are as far apart as random ones."""

from performer_lm.ops.hashing import mix_seed


def test_mix_seed_tells_order_and_neighbours_apart() -> None:
    seeds = {mix_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 8**3
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert mix_seed(-1, 0) != mix_seed(0, -1)
