import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.ids import HostIds
from performer_lm.data.layouts import stream_spans
from performer_lm.data.windows import FiniteWindows, listed_windows
from performer_lm.evaluation.perplexity import Perplexity, measure_perplexity
from performer_lm.evaluation.scoring import score_windows
from performer_lm.model import PerformerLM
from performer_lm.objectives import NextToken


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
