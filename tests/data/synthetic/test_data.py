import pickle

import numpy as np
import pytest
import torch

from performer_lm.data.synthetic.data import BLOCK, SyntheticData, TaskWindows
from performer_lm.data.synthetic.tasks import Copy, Recall
from performer_lm.data.windows import IGNORE, shown
from performer_lm.objectives import shift

RECALL = Recall(vocab_size=20, pairs=3, power=0.01)


def synthetic(task=RECALL, **changes) -> SyntheticData:
    options = {"context": 30, "batch_size": 8, "seed": 5, "num_workers": 0, "start_method": None}
    return SyntheticData(task=task, **{"validation_bytes": 500, **options, **changes})


def test_a_row_is_a_function_of_the_seed_and_its_number():
    windows = TaskWindows(RECALL, seed=5, context=30)
    whole = windows.rows(np.arange(3 * BLOCK))
    places = np.random.default_rng(0).permutation(3 * BLOCK)[:40]
    assert torch.equal(TaskWindows(RECALL, seed=5, context=30).rows(places), whole[places])
    assert torch.equal(pickle.loads(pickle.dumps(windows)).rows(places), whole[places])
    assert torch.equal(windows.to(torch.device("meta")).rows(places), whole[places])
    assert not torch.equal(TaskWindows(RECALL, seed=6, context=30).rows(places), whole[places])
    assert len(torch.unique(whole, dim=0)) == len(whole)


def test_everything_is_read_and_only_answers_count():
    rows = RECALL.draw(np.random.default_rng([5, 0]), count=BLOCK, context=30)
    ids, answers = rows.ids, rows.answers
    inputs, targets = shift(TaskWindows(RECALL, seed=5, context=30).rows(np.arange(BLOCK)))
    assert inputs.tolist() == ids.tolist()
    counted = targets != IGNORE
    assert counted[:, : ids.shape[1] - 1].tolist() == answers[:, 1:].tolist()
    assert targets[counted].tolist() == ids[answers].tolist()


def test_what_is_only_shown_comes_back():
    ids = torch.tensor([[0, 7, 300_000, 5, IGNORE]])
    window = torch.where(torch.tensor([True, True, True, False, False]), shown(ids), ids)
    inputs, targets = shift(window)
    assert (window[:, :3] < IGNORE).all()
    assert inputs.tolist() == [[0, 7, 300_000, 5]]
    assert targets.tolist() == [[IGNORE, IGNORE, 5, IGNORE]]


def test_validation_is_the_same_for_every_seed_and_unlike_training():
    one, other = synthetic(seed=0), synthetic(seed=1)
    for data in (one, other):
        data.prepare()
    rows = [data.validation.rows(np.arange(len(data.validation) + 2)) for data in (one, other)]
    assert torch.equal(rows[0], rows[1])
    assert (rows[0][-2:] == IGNORE).all()
    assert not (rows[0][:8, None] == one.training.rows(np.arange(500))).all(-1).any()
    targets = shift(rows[0])[1]
    spelled = one.tokenizer.decode_bytes(targets[targets != IGNORE].tolist())
    assert abs(len(spelled) - 500) < 20
    assert one.held_out is one.validation


def test_the_fingerprint_follows_the_task_and_its_options():
    tasks = [RECALL, Recall(vocab_size=20, pairs=3, power=0.02), Copy(symbols=5), Copy(symbols=6)]
    found = [synthetic(task).fingerprint() for task in tasks] + [synthetic(seed=6).fingerprint()]
    assert len({str(each) for each in found}) == len(found)
    assert all(isinstance(value, (str, int, float)) for each in found for value in each.values())


def test_a_task_that_does_not_fit_its_context_is_refused_at_once():
    with pytest.raises(ValueError, match=r"data.context \(10\) must be at least 11: 3 pairs"):
        synthetic(context=10)


def test_the_share_that_counts_is_that_of_answers():
    assert synthetic().has_answers
    assert synthetic().counted == pytest.approx(3 / 30)
    assert synthetic(Copy(symbols=5)).counted == pytest.approx(0.5)


@pytest.mark.parametrize("task", [RECALL, Copy(symbols=5)])
def test_the_prompt_asks_for_the_first_answer(task):
    data = synthetic(task)
    data.prepare()
    inputs, targets = shift(data.validation.rows(np.zeros(1, dtype=np.int64)))
    asked = data.tokenizer.encode(data.prompt)
    assert asked.tolist() == inputs[0, : len(asked)].tolist()
    assert (targets[0] != IGNORE).nonzero()[0] == len(asked) - 1
