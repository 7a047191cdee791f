"""Backends and features go by the names that the command line has for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.attention.base import parts_of

CHOICES = Path(__file__).parents[2] / "configs/attn"
NAMES = sorted({path.stem for path in CHOICES.glob("[!_]*.yaml")} - {"hybrid"})
Section = Callable[..., dict[str, Any]]


def test_every_backend_goes_by_its_name_on_the_command_line(model_section: Section) -> None:
    section = model_section("attn=hybrid", f"attn.pattern={NAMES}", f"model.depth={len(NAMES)}", "model.local_heads=0")
    with torch.device("meta"):
        assert [part.choice for part in parts_of(checkpoint.build(section))] == NAMES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["attn=delta", "attn/features=trig"], "attn=delta takes no attn/features=trig"),
        (["attn=linear", "attn.redraw_interval=9"], "attn/features=identity has none"),
        (["attn=relu", "attn.features.activation=cos"], "attn/features=generalized gives signed features"),
        (["model=performer_seq2seq", "attn=hybrid", "attn.pattern=[flash,local]"], "attn=local does not attend across"),
    ],
)
def test_refusals_name_what_the_user_types(options: list[str], message: str, model_section: Section) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message) as told:
        checkpoint.build(model_section(*options, tiny=[]))
    assert "Attention" not in str(told.value)
    assert "Features" not in str(told.value)
