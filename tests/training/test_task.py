from collections.abc import Callable
from typing import Any

import torch

from performer_lm.data.windows import IGNORE
from performer_lm.training.task import next_token_loss


def test_the_loss_of_padding_is_zero(lively_model: Callable[..., Any]) -> None:
    model = lively_model()
    windows = torch.randint(0, 40, (2, 9))
    whole = next_token_loss(model, windows)
    windows[1, 6:] = IGNORE
    padded = next_token_loss(model, windows)
    torch.testing.assert_close(padded[:, :5], whole[:, :5])
    assert not padded[1, 5:].any()


def test_the_loss_is_that_of_each_next_token(lively_model: Callable[..., Any]) -> None:
    model = lively_model()
    windows = torch.randint(0, 40, (2, 9))
    chances = model(windows[:, :-1]).float().log_softmax(-1)
    wanted = -chances.gather(-1, windows[:, 1:, None])[..., 0]
    torch.testing.assert_close(next_token_loss(model, windows), wanted)


def test_with_a_separator_no_token_sees_another_document(lively_model: Callable[..., Any]) -> None:
    model, end = lively_model(), 39
    first, second, other = (torch.randint(0, end, (2, size)) for size in (6, 5, 6))
    ends = torch.full((2, 1), end)
    packed, changed = (torch.cat((ends, text, ends, second), 1) for text in (first, other))
    loss = next_token_loss(model, packed, separator=end)
    torch.testing.assert_close(loss[:, 7:], next_token_loss(model, changed, separator=end)[:, 7:])
    torch.testing.assert_close(loss[:, 7:], next_token_loss(model, torch.cat((ends, second), 1)))
    assert not torch.allclose(loss[:, 7:], next_token_loss(model, packed)[:, 7:])
