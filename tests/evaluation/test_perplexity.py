import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.ids import HostIds, Spans
from performer_lm.data.layouts import stream_spans
from performer_lm.data.windows import IGNORE, FiniteWindows, listed_windows
from performer_lm.evaluation import scoring
from performer_lm.evaluation.perplexity import Perplexity, measure_perplexity
from performer_lm.evaluation.scoring import score_documents, score_rows, score_strided, score_windows
from performer_lm.model import PerformerLM
from performer_lm.objectives import NextToken
from performer_lm.training.task import LanguageModelTask


def measure_windows(model: Any, windows: FiniteWindows, **options: Any) -> Perplexity:
    return measure_perplexity(score_windows(model, windows, **options), byte_lengths=windows.byte_lengths)


def nats_of(model: PerformerLM, windows: torch.Tensor) -> float:
    return float(NextToken(chunk_size=None)(model, windows, step=None).nats.sum())


@given(n=st.integers(2, 60), context=st.integers(1, 20), batch_size=st.integers(1, 5))
def test_every_token_but_the_first_counts_once(
    lively_model: Callable[..., PerformerLM], n: int, context: int, batch_size: int
) -> None:
    ids = np.random.default_rng(n).integers(0, 40, n)
    lengths = np.arange(40)
    lengths[-1] = 0
    if not lengths[ids[1:]].sum():
        return
    model = lively_model("attn=exact")
    spans = stream_spans(n, context=context)
    windows = listed_windows(HostIds(ids), spans, context=context, byte_lengths=lengths)
    found = measure_windows(model, windows, objective=NextToken(chunk_size=None), batch_size=batch_size)
    with torch.no_grad():
        pieces = [torch.from_numpy(ids[start : start + context + 1])[None] for start in range(0, n - 1, context)]
        nats = sum(nats_of(model, piece) for piece in pieces)
    assert (found.tokens, found.bytes) == (n - 1, lengths[ids[1:]].sum())
    likeliest = [model(piece[:, :-1]).argmax(-1) == piece[:, 1:] for piece in pieces]
    assert found.accuracy == pytest.approx(sum(int(right.sum()) for right in likeliest) / (n - 1))
    assert found.loss == pytest.approx(nats / (n - 1), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-5)


def test_packed_documents_cost_what_they_cost_alone(lively_model: Callable[..., PerformerLM]) -> None:
    end, model = 39, lively_model("attn=favor")
    clm = NextToken(chunk_size=None)
    ones = np.ones(40, dtype=np.int64)
    texts = [torch.randint(0, end, (size,)) for size in (5, 1, 9)]
    ends = torch.tensor([end])
    documents = [torch.cat((ends, text, ends)) for text in texts]
    stream = torch.cat([ends, *(part for text in texts for part in (text, ends))]).numpy()
    spans = stream_spans(len(stream), context=40)
    windows = listed_windows(HostIds(stream), spans, context=40, byte_lengths=ones)
    found = measure_windows(model, windows, objective=clm, batch_size=1, separator=end)
    with torch.no_grad():
        alone = sum(nats_of(model, document[None]) for document in documents)
    assert found.tokens == sum(len(document) - 1 for document in documents)
    assert found.loss * found.tokens == pytest.approx(alone, rel=1e-5)
    assert found.loss != pytest.approx(measure_windows(model, windows, objective=clm, batch_size=1).loss)


END = 39


def stream_windows(ids: torch.Tensor, context: int) -> FiniteWindows:
    spans = stream_spans(len(ids), context=context)
    return listed_windows(HostIds(ids.numpy()), spans, context=context, byte_lengths=np.ones(40))


def test_without_options_it_is_the_trainer_s_own_number(lively_model: Callable[..., PerformerLM]) -> None:
    model, objective = lively_model("attn=favor"), NextToken(chunk_size=None)
    windows = stream_windows(torch.randint(0, END, (200,)), 24)
    options: Any = {"optimizer": torch.optim.SGD, "schedule": lambda steps: lambda step: 1.0, "log_every": 1}
    lengths = torch.arange(40)
    task = LanguageModelTask(model, objective=objective, byte_lengths=lengths, section={}, **options)
    task.on_validation_epoch_start()
    with torch.no_grad():
        for first in range(0, len(windows), 3):
            task.validation_step(windows.rows(np.arange(first, first + 3)), 0)
    nats, (tokens, text, _) = task._sums
    found = measure_perplexity(
        score_windows(model, windows, objective=objective, batch_size=4), byte_lengths=lengths.numpy()
    )
    assert (found.tokens, found.bytes) == (int(tokens), int(text))
    assert found.loss == pytest.approx(float(nats / tokens), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(float(nats / text) / math.log(2), rel=1e-12)


@pytest.mark.parametrize(("n", "context", "stride"), [(50, 12, 5), (50, 12, 12), (49, 12, 1), (9, 12, 4), (25, 12, 6)])
def test_with_a_stride_each_token_counts_once_after_as_many_others_as_fit(
    lively_model: Callable[..., PerformerLM], n: int, context: int, stride: int
) -> None:
    model, objective = lively_model("attn=exact"), NextToken(chunk_size=None)
    ids = torch.randint(0, END, (n,))
    expected, done = [], 0
    for start in range(0, n, stride):
        window = ids[start : start + context + 1]
        losses = objective(model, window[None], step=None).nats[0]
        expected.append(losses[done - start :])
        done = start + len(losses)
        if done == n - 1:
            break
    options: Any = {"objective": objective, "batch_size": 2, "stride": stride}
    scores = [*score_strided(model, stream_windows(ids, context), **options)]
    assert np.concatenate([each.targets for each in scores]).tolist() == ids[1:].tolist()
    assert np.concatenate([each.nats for each in scores]).tolist() == pytest.approx(torch.cat(expected).tolist())


@pytest.mark.parametrize("attn", ["favor", "flash", "local", "delta"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_carried_documents_cost_what_they_cost_read_whole(
    lively_model: Callable[..., PerformerLM], attn: str, batch_size: int
) -> None:
    model = lively_model(f"attn={attn}")
    ends = torch.tensor([END])
    texts = [torch.randint(0, END, (size,)) for size in (61, 1, 0, 9)]
    stream = torch.cat([ends, *(part for text in texts for part in (text, ends))])
    scores = [*score_documents(model, stream_windows(stream, 8), batch_size=batch_size, end_id=END)]
    with torch.no_grad():
        alone = [NextToken(chunk_size=None)(model, torch.cat((ends, text, ends))[None], step=None) for text in texts]
    assert np.concatenate([each.targets for each in scores]).tolist() == stream[1:].tolist()
    expected = [nat for losses in alone for nat in losses.nats[0].tolist()]
    assert np.concatenate([each.nats for each in scores]).tolist() == pytest.approx(expected, rel=1e-9)
    positions = [place for text in texts for place in range(len(text) + 1)]
    assert np.concatenate([each.positions for each in scores]).tolist() == positions


def test_a_document_is_read_in_blocks_however_long_a_batch_is(
    lively_model: Callable[..., PerformerLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively_model("attn=favor")
    windows = stream_windows(torch.randint(0, END, (150,)), 50)
    whole = [*score_documents(model, windows, batch_size=4, end_id=END)]
    monkeypatch.setattr(scoring, "READ_AT_ONCE", 7)
    parts = [*score_documents(model, windows, batch_size=4, end_id=END)]
    assert max(len(each.nats) for each in parts) == 7
    nats = [np.concatenate([each.nats for each in scores]).tolist() for scores in (whole, parts)]
    assert nats[0] == pytest.approx(nats[1], rel=1e-9)


@pytest.mark.parametrize("attn", ["favor", "flash"])
def test_ragged_rows_are_scored_as_each_alone(
    lively_model: Callable[..., PerformerLM], attn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "READ_AT_ONCE", 12)
    model = lively_model(f"attn={attn}")
    ids = torch.randint(0, END, (3, 21))
    targets = ids.roll(-1, dims=1)
    for row, (first, last) in enumerate([(0, 20), (5, 9), (3, 3)]):
        targets[row, :first], targets[row, last:] = IGNORE, IGNORE
    found = score_rows(model, ids, targets)
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none")
    for own, row, wanted in zip(found, nats, targets, strict=True):
        assert own.nats.tolist() == pytest.approx(row[wanted != IGNORE].tolist(), rel=1e-9)
        assert own.positions.tolist() == (wanted != IGNORE).nonzero()[:, 0].tolist()


def test_windows_that_do_not_go_on_from_one_another_are_not_read_on(lively_model: Callable[..., PerformerLM]) -> None:
    model, objective = lively_model("attn=favor"), NextToken(chunk_size=None)
    spans = Spans(np.array([0, 5, 30]), np.array([9, 14, 36]))
    ids = HostIds(torch.randint(0, END, (60,)).numpy())
    apart = listed_windows(ids, spans, context=8, byte_lengths=np.ones(40))
    with pytest.raises(ValueError, match="do not go on from one another"):
        list(score_documents(model, apart, batch_size=2, end_id=END))
    with pytest.raises(ValueError, match="do not go on from one another"):
        list(score_strided(model, apart, objective=objective, batch_size=2, stride=4))
    with pytest.raises(ValueError, match=r"task.stride \(9\) must be at most data.context \(8\)"):
        list(score_strided(model, apart, objective=objective, batch_size=2, stride=9))


def test_a_document_past_the_learned_positions_is_one_line(lively_model: Callable[..., PerformerLM]) -> None:
    model = lively_model("attn=favor", "model/absolute=learned", "data.context=64")
    ids = torch.randint(0, END, (66,))
    assert sum(len(each.nats) for each in score_documents(model, stream_windows(ids[:65], 8), batch_size=2, end_id=END))
    with pytest.raises(ValueError, match=r"^a text of at least 65 tokens is longer than the 64 learned positions"):
        list(score_documents(model, stream_windows(ids, 8), batch_size=2, end_id=END))
