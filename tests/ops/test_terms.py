import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from performer_lm.ops.checks import fold, gather_terms, sum_of_newer
from performer_lm.ops.terms import ALL, add_block, slice_block, slices

CPU = torch.device("cpu")


def gather(queries: int, keys: int, **options):
    q, k = torch.zeros(2, 4, queries, 3), torch.zeros(2, 2, keys, 3)
    return gather_terms(q, k, k, **options)


@st.composite
def draw_terms(draw):
    keys, queries = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    options = {"causal": draw(st.booleans()), "window": draw(st.one_of(st.none(), st.integers(1, 12)))}
    return gather(queries, keys, **options)


places = st.tuples(st.integers(0, 11), st.integers(0, 11)).map(sorted)


@given(terms=draw_terms(), rows=places, cols=places)
def test_a_block_is_empty_exactly_when_all_of_it_is_hidden(terms, rows, cols):
    rows = slice(min(rows[0], terms.queries - 1), min(rows[1] + 1, terms.queries))
    cols = slice(min(cols[0], terms.keys - 1), min(cols[1] + 1, terms.keys))
    hidden = terms.hidden(rows, cols, CPU)
    assert terms.is_empty(rows, cols) == (hidden is not None and bool(hidden.all()))


@given(terms=draw_terms(), rows=places, cols=places)
def test_what_a_block_hides_is_that_part_of_the_whole(terms, rows, cols):
    rows, cols = slice(rows[0], rows[1] + 1), slice(cols[0], cols[1] + 1)
    nothing = torch.zeros(terms.queries, terms.keys, dtype=torch.bool)
    whole, part = terms.hidden(ALL, ALL, CPU), terms.hidden(rows, cols, CPU)
    wanted = (nothing if whole is None else whole)[rows, cols]
    assert torch.equal(nothing[rows, cols] if part is None else part, wanted)


def test_a_window_over_masked_keys_is_never_called_empty_from_places_alone():
    terms = gather(10, 10, window=2, key_mask=torch.tensor([[True] * 3 + [False] * 6 + [True]] * 2))
    assert not terms.is_empty(slice(9, 10), slice(2, 3))
    assert not terms.hidden(slice(9, 10), slice(2, 3), CPU)[0].any()


@given(queries=st.integers(1, 6), keys=st.integers(1, 6), causal=st.booleans(), window=st.sampled_from([None, 1, 3]))
def test_rows_that_may_be_hidden_are_foreseen(queries, keys, causal, window):
    terms = gather(queries, keys, causal=causal, window=window)
    hidden = terms.hidden(ALL, ALL, CPU)
    if hidden is not None and hidden.all(-1).any():
        assert terms.may_hide_rows


@given(length=st.integers(0, 20), size=st.integers(1, 25))
def test_slices_cover_every_place_once_in_order(length, size):
    assert [place for part in slices(length, size) for place in range(*part.indices(length))] == list(range(length))


def test_adding_to_a_block_sums_over_what_broadcasts():
    whole = torch.zeros(1, 4, 6, 1)
    add_block(whole, torch.ones(2, 4, 3, 5), slice(1, 4), slice(0, 5))
    assert torch.equal(whole[0, :, :, 0], torch.tensor([0.0, 10, 10, 10, 0, 0]).expand(4, -1))
    assert slice_block(whole, slice(1, 4), slice(7, 9)).shape == (1, 4, 3, 1)


def test_folding_keeps_what_broadcasts_within_a_batch():
    assert fold(torch.zeros(5, 7), (2, 3)).shape == (1, 1, 5, 7)
    assert fold(torch.zeros(3, 1, 5, 7), (2, 3)).shape == (6, 1, 5, 7)
    assert fold(torch.zeros(1, 4, 5, 7), (2,)).shape == (1, 4, 5, 7)


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
        ({"dropout": -0.1, "seed": 0}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"dropout": 1.0, "seed": 0}, "dropout must be at least 0 and below 1, got 1.0"),
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
