import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from performer_lm.data.ids import Indices
from performer_lm.data.synthetic.tasks import Copy, Induction, Recall, Rows, SelectiveCopy, Task, _distinct

TASKS: list[Task] = [
    Copy(symbols=5),
    SelectiveCopy(symbols=5, length=4),
    Induction(symbols=5),
    Recall(vocab_size=20, pairs=3, power=0.01),
]


class Answered(NamedTuple):
    ids: Indices
    answers: NDArray[np.bool_]


def draw_rows(task: Task, context: int, *, count: int = 50, seed: int = 0) -> Rows:
    return task.draw(np.random.default_rng(seed), count=count, context=context)


def draw(task: Task, context: int, *, count: int = 50, seed: int = 0) -> Answered:
    rows = draw_rows(task, context, count=count, seed=seed)
    return Answered(rows.ids, rows.answers)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
@given(context=st.integers(11, 70), seed=st.integers(0, 5))
def test_rows_fit_a_window_of_ids_that_have_names(task, context, seed):
    task.check(context=context)
    ids, answers = draw(task, context, seed=seed)
    assert ids.shape == answers.shape
    assert context - 1 <= ids.shape[1] <= context + 1
    assert 0 <= ids.min() <= ids.max() < len(task.names) == len(set(task.names))
    assert answers[:, 1:].any(1).all()
    assert not answers[:, 0].any()
    assert np.array_equal(draw(task, context, seed=seed).ids, ids)
    assert not np.array_equal(draw(task, context, seed=seed + 1).ids, ids)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
@given(context=st.integers(11, 70))
def test_an_answer_repeats_the_id_at_its_source_which_stands_before_it(task, context):
    ids, sources = draw_rows(task, context)
    rows, places = np.nonzero(sources >= 0)
    assert (sources[rows, places] < places).all()
    assert np.array_equal(ids[rows, places], ids[rows, sources[rows, places]])


@pytest.mark.parametrize("task", [TASKS[1], TASKS[3]], ids=["SelectiveCopy", "Recall"])
def test_a_resized_task_has_the_same_ids_and_as_many_answers_as_its_size(task):
    assert draw(task, 40).answers.sum(1).tolist() == [task.size] * 50
    larger = task.resized(task.size + 2)
    assert larger.names == task.names
    assert draw(larger, 40).answers.sum(1).tolist() == [task.size + 2] * 50
    same = task.resized(task.size)
    assert np.array_equal(draw(same, 40).ids, draw(task, 40).ids)


def test_a_task_of_one_size_says_so():
    with pytest.raises(ValueError, match=r"^Copy has no other size than its length$"):
        TASKS[0].resized(3)


@given(context=st.integers(2, 40))
def test_a_copy_repeats_what_stands_before_the_separator(context):
    ids, answers = draw(Copy(symbols=5), context)
    length = context // 2
    assert (ids[:, length] == 5).all()
    assert np.array_equal(ids[:, :length], ids[:, length + 1 :])
    assert np.array_equal(answers, np.broadcast_to(np.arange(ids.shape[1]) > length, ids.shape))


@given(context=st.integers(8, 60))
def test_a_selective_copy_repeats_the_symbols_in_their_order(context):
    ids, answers = draw(SelectiveCopy(symbols=5, length=4), context)
    for row, counted in zip(ids, answers, strict=True):
        shown = row[: context - 3]
        assert shown[-1] == 6
        assert shown[shown < 5].tolist() == row[counted].tolist() == row[-4:].tolist()
    many, _ = draw(SelectiveCopy(symbols=5, length=4), context, count=1000)
    places = np.argwhere(many[:, : context - 4] < 5)[:, 1]
    assert set(places) == set(range(context - 4))


@given(context=st.integers(3, 40))
def test_induction_asks_for_what_followed_the_marker(context):
    ids, answers = draw(Induction(symbols=5), context)
    assert np.array_equal(answers.sum(1), np.ones(50))
    assert answers[:, -1].all()
    for row in ids:
        first, last = np.flatnonzero(row == 5)
        assert last == context - 1
        assert row[-1] == row[first + 1]


@given(context=st.integers(11, 60), power=st.sampled_from([0.01, 1.0, 3.0]))
def test_recall_asks_once_for_the_value_of_every_key(context, power):
    ids, answers = draw(Recall(vocab_size=20, pairs=3, power=power), context)
    for row, counted in zip(ids, answers, strict=True):
        pairs = dict(zip(row[:6:2].tolist(), row[1:6:2].tolist(), strict=True))
        assert len(pairs) == 3
        assert set(pairs) <= set(range(1, 10))
        assert set(pairs.values()) <= set(range(10, 20))
        places = np.flatnonzero(counted)
        assert {int(row[place - 1]): int(row[place]) for place in places} == pairs
        rest = np.delete(row[6:], np.concatenate((places, places - 1)) - 6)
        assert not rest.any()


def test_recall_s_queries_stand_near_by_a_power_law_or_anywhere():
    near, anywhere = (
        np.argwhere(draw(Recall(vocab_size=20, pairs=1, power=power), 63, count=4000).answers)[:, 1]
        for power in (0.01, 1.0)
    )
    assert (near <= 3).mean() > 0.2 > 0.05 > (anywhere <= 3).mean()
    assert 30 < anywhere.mean() < 36


def test_draws_without_repetition_follow_their_weights():
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    drawn = _distinct(np.random.default_rng(0), 20_000, 4, 4, weights=weights)
    assert (np.sort(drawn, axis=1) == np.arange(4)).all()
    first = np.bincount(drawn[:, 0]) / 20_000
    np.testing.assert_allclose(first, weights / 8, atol=0.015)  # four standard errors of a half in 20,000 are 0.014
    after_0 = drawn[drawn[:, 0] == 0, 1]
    np.testing.assert_allclose(
        np.bincount(after_0)[1:] / len(after_0), weights[1:] / 4, atol=0.02
    )  # and in 10,000, 0.02


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Copy(symbols=1), "symbols must be at least 2"),
        (lambda: SelectiveCopy(symbols=4, length=0), "length must be at least 1"),
        (lambda: Recall(vocab_size=9, pairs=4, power=1.0), "data.task.vocab_size (9) must be at least 10 for 4 pairs"),
        (lambda: Recall(vocab_size=99, pairs=0, power=1.0), "pairs must be at least 1"),
        (lambda: Recall(vocab_size=99, pairs=4, power=0.0), "power must be above 0"),
        (lambda: Copy(symbols=4).check(context=1), "data.context (1) must be at least 2"),
        (lambda: SelectiveCopy(symbols=4, length=8).check(context=15), "must be at least 16: 8 symbols and their copy"),
        (lambda: Induction(symbols=4).check(context=2), "data.context (2) must be at least 3"),
        (lambda: Recall(vocab_size=99, pairs=8, power=1.0).check(context=30), "must be at least 31: 8 pairs"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
