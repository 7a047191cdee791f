from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from performer_lm.data.ids import HostIds
from performer_lm.data.layouts import stream_spans
from performer_lm.data.windows import IGNORE, FiniteWindows, listed_windows, shown
from performer_lm.evaluation.copying import bigram_distances, compare_copying
from performer_lm.model import PerformerLM
from performer_lm.objectives import NextToken

END = 5


def naive_distances(window: list[int], separator: int | None) -> list[int]:
    """Return, for each token but the first, how far back it and the one before it last stood, looking one by one."""
    found = []
    for place in range(1, len(window)):
        back = 0
        for steps in range(1, place):
            if separator is not None and window[place - steps] == separator:  # begins the token's document
                break
            if window[place - steps - 1 : place - steps + 1] == window[place - 1 : place + 1]:
                back = steps
                break
        found.append(back)
    return found


@given(st.lists(st.integers(0, END), min_size=2, max_size=40), st.sampled_from([None, END]))
def test_a_bigram_s_distance_is_that_of_looking_back_one_by_one(ids: list[int], separator: int | None) -> None:
    if separator is not None and ids[-1] == separator:
        ids[-1] = 0
    rows = torch.tensor([ids, ids[::-1]])
    if separator is not None:
        rows = rows[:1]
    assert bigram_distances(rows, separator).tolist() == [naive_distances(row, separator) for row in rows.tolist()]


def test_tokens_that_are_only_shown_are_copied_from_and_fill_is_not() -> None:
    ids = torch.tensor([[1, 2, 0, 1, 2, IGNORE, IGNORE, IGNORE]])
    assert bigram_distances(ids).tolist()[0][:4] == [0, 0, 0, 3]
    ids[0, :4] = shown(ids[0, :4])
    assert bigram_distances(ids).tolist()[0][:4] == [0, 0, 0, 3]


def windows_of(ids: Tensor, context: int) -> FiniteWindows:
    spans = stream_spans(len(ids), context=context)
    return listed_windows(HostIds(ids.numpy()), spans, context=context, byte_lengths=np.ones(40))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_by_bucket_are_those_of_a_loop_over_tokens(
    lively_model: Callable[..., PerformerLM], batch_size: int
) -> None:
    models = [lively_model("attn=favor"), lively_model("attn=exact")]
    ids, context = torch.randint(0, 8, (701,)), 200  # the last window is short
    expected: dict[tuple[str, str], list[list[float]]] = {}
    for start in range(0, 700, context):
        window = ids[start : start + context + 1]
        losses = [NextToken(chunk_size=None)(model, window[None], step=None).nats[0].tolist() for model in models]
        for place, back in enumerate(naive_distances(window.tolist(), None)):
            ends = ((16, "1-16"), (64, "16-64"), (128, "64-128"), (200, "128-200"))
            far = next(label for end, label in ends if back < end) if back else "not yet"
            position = "0-64" if place < 64 else "64-200"
            for key in (("all", "all"), ("position", position), ("bigram", far)):
                expected.setdefault(key, []).append([own[place] for own in losses])
    lines = compare_copying(models, windows_of(ids, context), batch_size=batch_size)
    assert {line[:2] for line in lines} == expected.keys()
    for line in lines:
        own = torch.tensor(expected[line[:2]])
        assert line.tokens == len(own)
        assert line.share == pytest.approx(len(own) / 700)
        assert line.losses == pytest.approx(own.mean(0).tolist(), rel=1e-6)


def test_a_part_of_the_windows_lies_evenly_over_the_text(lively_model: Callable[..., PerformerLM]) -> None:
    models, ids = [lively_model("attn=exact")], torch.randint(0, 8, (401,))
    some = compare_copying(models, windows_of(ids, 100), count=2, batch_size=4)
    first, last = (compare_copying(models, windows_of(part, 100), batch_size=1)[0] for part in (ids[:101], ids[300:]))
    assert some[0].losses[0] == pytest.approx((first.losses[0] + last.losses[0]) / 2)
    assert some[0].tokens == 200
