from collections.abc import Callable
from typing import Any

import pytest
import torch

from performer_lm.data.windows import IGNORE
from performer_lm.training import objectives
from performer_lm.training.objectives import NextToken, choose_chunk_size


def test_the_loss_is_that_of_each_next_token(lively_model: Callable[..., Any]) -> None:
    model = lively_model()
    windows = torch.randint(0, 40, (2, 9))
    nats, targets = NextToken(chunk_size=None)(model, windows, step=0)
    chances = model(windows[:, :-1]).log_softmax(-1)
    torch.testing.assert_close(nats, -chances.gather(-1, windows[:, 1:, None])[..., 0])
    assert torch.equal(targets, windows[:, 1:])


def test_the_loss_of_padding_is_zero(lively_model: Callable[..., Any]) -> None:
    model, objective = lively_model(), NextToken(chunk_size=None)
    windows = torch.randint(0, 40, (2, 9))
    whole = objective(model, windows, step=None)
    windows[1, 6:] = IGNORE
    padded = objective(model, windows, step=None)
    torch.testing.assert_close(padded.nats[:, :5], whole.nats[:, :5])
    assert not padded.nats[1, 5:].any()
    assert (padded.targets[1, 5:] == IGNORE).all()


def test_with_a_separator_no_token_sees_another_document(lively_model: Callable[..., Any]) -> None:
    model, end = lively_model(), 39

    def loss(*pieces: torch.Tensor, separator: int | None) -> torch.Tensor:
        return NextToken(chunk_size=None)(model, torch.cat(pieces, 1), step=0, separator=separator).nats

    first, second, other = (torch.randint(0, end, (2, size)) for size in (6, 5, 6))
    ends = torch.full((2, 1), end)
    packed = loss(ends, first, ends, second, separator=end)[:, 7:]
    torch.testing.assert_close(packed, loss(ends, other, ends, second, separator=end)[:, 7:])
    torch.testing.assert_close(packed, loss(ends, second, separator=None))
    assert not torch.allclose(packed, loss(ends, first, ends, second, separator=None)[:, 7:])


@pytest.mark.parametrize("options", [[], ["model.tie_embeddings=true"], ["model.head_bias=true"]])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 100])
def test_chunks_change_neither_losses_nor_gradients(
    lively_model: Callable[..., Any], options: list[str], chunk_size: int
) -> None:
    model = lively_model(*options)
    windows = torch.randint(0, 40, (2, 9))
    windows[1, 6:] = IGNORE
    found = []
    for objective in (NextToken(chunk_size=None), NextToken(chunk_size=chunk_size)):
        losses = objective(model, windows, step=0, separator=7)
        gradients = torch.autograd.grad(objective.mean(losses), list(model.parameters()))
        found.append((losses.nats, *gradients))
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-10)


def test_many_logits_are_held_in_chunks(lively_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_chunk_size(2048, vocab_size=2048) == 2048  # the default run
    assert choose_chunk_size(2049, vocab_size=2**15) == 1024
    assert choose_chunk_size(2, vocab_size=2**26) == 1
    asked: list[int] = []

    def note(hidden: torch.Tensor, *arguments: Any, chunk_size: int, **options: Any) -> torch.Tensor:
        asked.append(chunk_size)
        return hidden[..., 0]

    monkeypatch.setattr(objectives, "linear_cross_entropy", note)
    monkeypatch.setattr(objectives, "WHOLE", 16 * 40 - 1)
    monkeypatch.setattr(objectives, "PIECE", 5 * 40)
    NextToken(chunk_size=None)(lively_model(), torch.zeros(2, 9, dtype=torch.int64), step=0)
    assert asked == [5]


def test_a_chunk_holds_something() -> None:
    with pytest.raises(ValueError, match=r"objective\.chunk_size must be at least 1, got 0"):
        NextToken(chunk_size=0)
