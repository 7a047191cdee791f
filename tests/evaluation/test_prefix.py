from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from performer_lm.evaluation.prefix import compare_prefix
from performer_lm.model import PerformerLM

KINDS = {
    "favor": ["attn=favor"],
    "delta": ["attn=delta"],
    "flash": ["attn=flash"],
    "hybrid": ["attn=hybrid", "attn.pattern=[favor,local]"],
    "local heads": ["attn=favor", "model.local_heads=1"],
    "rotary": ["model=transformer", "attn=exact"],
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_generation_sees_what_a_forward_sees(lively_model: Callable[..., PerformerLM], options: list[str]) -> None:
    found = compare_prefix(lively_model(*options), torch.randint(0, 40, (2, 20)))
    assert found.size < 1e-9
    assert found.agreeing == 1


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_the_place_of_the_largest_difference_is_named(
    lively_model: Callable[..., PerformerLM], monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    model = lively_model("attn=favor")
    true = model.forward

    def forward(tokens: Tensor) -> Tensor:
        logits = true(tokens).clone()
        logits[1, 7, 33] += wrong
        logits[0, 12, 2] -= 0.25
        return logits

    monkeypatch.setattr(model, "forward", forward)
    found = compare_prefix(model, torch.randint(0, 40, (2, 20)))
    assert found[:3] == (1, 7, 33)
    assert found.size == pytest.approx(wrong, nan_ok=True)
