from collections.abc import Callable

import numpy as np
import pytest
import torch

from performer_lm.data.synthetic.data import HELD_OUT
from performer_lm.data.synthetic.tasks import Copy, Induction, Recall, SelectiveCopy, Task
from performer_lm.evaluation.recall import ask
from performer_lm.model import PerformerLM

TASKS: list[Task] = [
    Copy(symbols=5),
    SelectiveCopy(symbols=5, length=4),
    Induction(symbols=5),
    Recall(vocab_size=20, pairs=3, power=0.01),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_answers_are_counted_as_a_loop_over_rows_counts_them(
    lively_model: Callable[..., PerformerLM], task: Task
) -> None:
    model, length = lively_model("attn=favor"), 24
    expected, places = [], []
    for row in range(5):
        ids, sources = task.draw(np.random.default_rng([HELD_OUT, length, row]), count=1, context=length)
        with torch.no_grad():
            likeliest = model(torch.from_numpy(ids))[0].argmax(-1).tolist()
        for place, source in enumerate(sources[0]):
            if source >= 0:
                expected.append(likeliest[place - 1] == ids[0, place])
                places.append(source / place)
    for at_once in (1, 3, 8):
        right, depths = ask(model, task, length=length, rows=5, at_once=at_once)
        assert right.tolist() == expected
        assert depths.tolist() == pytest.approx(places)
        assert 0 <= depths.min() <= depths.max() < 1


def test_a_model_that_copies_is_right_at_every_length(lively_model: Callable[..., PerformerLM]) -> None:
    class Copier(torch.nn.Module):
        """A model of 6 ids that looks up what stands where the answer's source does."""

        head = torch.nn.Identity()

        def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
            half = (tokens[0] == 5).nonzero()[0, 0]
            return torch.nn.functional.one_hot(tokens.roll(int(half), dims=1), 6).float()

    model = Copier()
    model.head.weight = torch.zeros(1)  # type: ignore[assignment]
    for length in (8, 30):
        right, _ = ask(model, Copy(symbols=5), length=length, rows=3, at_once=2)  # type: ignore[arg-type]
        assert right.all()
        assert len(right) == 3 * (length // 2)
