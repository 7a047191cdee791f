import pytest
import torch
from torch import Tensor

from performer_lm.ops.options import gather_terms, sum_of_newer


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_decay_is_summed_over_newer_kept_keys():
    log_decay = -torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])
    assert sum_of_newer(log_decay, None).tolist() == [[[-14.0, -12.0, -8.0, 0.0]]]
    key_mask = torch.tensor([[True, True, False, True]])
    assert sum_of_newer(log_decay, key_mask).tolist() == [[[-10.0, -8.0, -8.0, 0.0]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"log_decay": torch.zeros(2, 2, 5)}, "log_decay needs causal=True"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, r"key_mask must be .* of shape \(2, 5\); .* \(2, 4\)"),
        ({"segments": torch.zeros(5).long()}, r"segments must be .* of shape \(2, 5\); got int64 of shape \(5,\)"),
        ({"causal": True, "log_decay": torch.zeros(2, 4, 5)}, r"log_decay must be .* of shape \(2, 2, 5\)"),
        ({"dropout": 0.1}, "needs a seed"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    q, k, v = draw((2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 2))
    with pytest.raises(ValueError, match=message):
        gather_terms(q, k, v, **options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 3, 2), (2, 3, 5, 2), (2, 3, 5, 2)), r"heads \(4\) must be a multiple of key heads \(3\)"),
        (((2, 4, 3, 2), (2, 2, 5, 3), (2, 2, 5, 2)), "q's width 2"),
        (((2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 4, 2)), "v's heads and keys"),
        (((2, 4, 3, 2), (3, 2, 5, 2), (3, 2, 5, 2)), "equal leading dimensions"),
        (((3, 2), (5, 2), (5, 2)), "wanted q"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        gather_terms(*draw(*shapes))


def test_segments_need_each_query_among_the_keys():
    q, k, v = draw((1, 1, 4, 2), (1, 1, 3, 2), (1, 1, 3, 2))
    with pytest.raises(ValueError, match="4 > 3"):
        gather_terms(q, k, v, segments=torch.zeros(1, 3, dtype=torch.long))
