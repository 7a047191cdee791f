import pytest
import torch

from performer_lm.ops.checks import gather_terms
from performer_lm.ops.chunks import cut


def gather(tokens: int, **options):
    q = torch.zeros(1, 2, tokens, 1)
    return gather_terms(q, q, q, **options)


def test_chunks_never_exceed_the_lengths_and_are_never_nothing():
    for tokens in (1, 3, 5000):
        chunks = cut(1, gather(tokens), None, None)
        assert 1 <= chunks.rows <= tokens
        assert 1 <= chunks.cols <= tokens
    assert cut(1, gather(10), 3, 4).rows == 3
    assert cut(1, gather(10), 300, 400).cols == 10


def test_default_key_chunks_grow_with_the_root_of_the_length():
    assert cut(1, gather(65536), None, None).cols == 4 * 256
    assert cut(1, gather(4096), None, None).cols == 4 * 64


def test_every_pair_is_worked_on_once_and_the_future_never():
    chunks = cut(1, gather(20, causal=True), 6, 4)
    seen = torch.zeros(20, 20)
    for rows in chunks.query_chunks():
        for cols in chunks.key_chunks(rows):
            seen[rows, cols] += 1
    assert seen.max() == 1
    assert (seen[torch.ones(20, 20).tril() > 0] == 1).all()
    assert seen.sum() < 300  # of 400


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_a_chunk_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        cut(1, gather(4), *sizes)
