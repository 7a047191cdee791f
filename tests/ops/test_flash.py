import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.ops.flash import tile_sizes, tiled_attention, tiled_attention_and_logsumexp
from performer_lm.ops.softmax import exact_attention


@given(data=st.data(), on_chip=st.integers(1, 300))
def test_tiled_equals_exact_for_every_option_and_any_tiles(calls, agree, data, on_chip):
    agree(tiled_attention, exact_attention, data.draw(calls()), on_chip=on_chip)


def draw(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_gradcheck_with_every_option():
    q, k, v, bias = draw((2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 3), (1, 4, 1, 5))
    log_decay = (-torch.rand(2, 2, 5, dtype=torch.float64)).requires_grad_()
    key_mask = torch.tensor(
        [[True] * 5, [False, False, False, True, False]]
    )  # the second row's first query sees no key

    def attend(q, k, v, bias, log_decay):
        return tiled_attention_and_logsumexp(
            q, k, v, causal=True, key_mask=key_mask, bias=bias, log_decay=log_decay, dropout=0.3, seed=1, on_chip=16
        )[0]

    torch.autograd.gradcheck(attend, (q, k, v, bias, log_decay))


def test_gradcheck_of_the_logsumexp():
    q, k, v = draw((1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 2))
    log_decay = (-torch.rand(1, 1, 4, dtype=torch.float64)).requires_grad_()

    def both(q, k, v, log_decay):
        return tiled_attention_and_logsumexp(q, k, v, causal=True, log_decay=log_decay, on_chip=16)

    torch.autograd.gradcheck(both, (q, k, v, log_decay))


def test_logsumexp_is_that_of_the_scores():
    q, k, v = draw((2, 2, 6, 4), (2, 2, 7, 4), (2, 2, 7, 3))
    _, logsumexp = tiled_attention_and_logsumexp(q, k, v, scale=0.3, on_chip=20)
    torch.testing.assert_close(logsumexp, (0.3 * q @ k.mT).logsumexp(-1))
    _, of_nothing = tiled_attention_and_logsumexp(q, k, v, key_mask=torch.zeros(2, 7, dtype=torch.bool))
    assert of_nothing.isneginf().all()


def test_two_sets_of_keys_merge_by_their_logsumexps():
    q, k, v = draw((2, 2, 6, 4), (2, 2, 9, 4), (2, 2, 9, 3))
    parts = [tiled_attention_and_logsumexp(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 4), slice(4, 9))]
    weights = torch.stack([logsumexp for _, logsumexp in parts]).softmax(0)[..., None]
    merged = (weights * torch.stack([out for out, _ in parts])).sum(0)
    torch.testing.assert_close(merged, exact_attention(q, k, v))


def test_tiles_follow_the_memory():
    assert tile_sizes(48 * 1024, 64) == (64, 192)
    assert tile_sizes(1, 64) == (1, 1)
    assert all(
        rows * width + 2 * cols * width <= 3 * 40_000 / 4 + 3 * width
        for width in (16, 64)
        for rows, cols in [tile_sizes(40_000, width)]
    )
    with pytest.raises(ValueError, match="on_chip must be at least 1, got 0"):
        tile_sizes(0, 64)
