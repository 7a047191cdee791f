"""Backends and features go by the names that the command line has for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.attention.base import parts_of
from performer_lm.attention.favor import FavorAttention

CHOICES = Path(__file__).parents[2] / "configs/attn"
Section = Callable[..., dict[str, Any]]


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("[!_]*.yaml"))


@pytest.mark.parametrize("name", [name for name in names(CHOICES) if name != "hybrid"])
def test_a_backend_goes_by_its_name_on_the_command_line(name: str, model_section: Section) -> None:
    for options in ([f"attn={name}"], ["attn=hybrid", f"attn.pattern=[{name}]"]):
        with torch.device("meta"):
            model = checkpoint.build(model_section(*options, "model.local_heads=0"))
        assert {part.choice for part in parts_of(model)} == {name}


@pytest.mark.parametrize("name", names(CHOICES / "features"))
def test_features_go_by_their_name_on_the_command_line(name: str, model_section: Section) -> None:
    options = ["model=performer_encoder", f"attn/features={name}", "attn.num_features=null"]
    with torch.device("meta"):
        model = checkpoint.build(model_section(*options))
    assert {part.features.choice for part in parts_of(model) if isinstance(part, FavorAttention)} == {name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["attn=delta", "attn/features=trig"], "attn=delta takes no attn/features=trig"),
        (["attn=delta", "attn/features=taylor2"], None),
        (["attn=linear", "attn.redraw_interval=9"], "attn/features=identity has none"),
        (["attn=favor", "attn/features=learned", "attn.redraw_interval=9"], "attn/features=learned has none"),
        (["attn=relu", "attn.features.activation=cos"], "attn/features=generalized gives signed features"),
        (["model=performer_seq2seq", "attn=hybrid", "attn.pattern=[flash,local]"], "attn=local does not attend across"),
    ],
)
def test_refusals_name_what_the_user_types(options: list[str], message: str | None, model_section: Section) -> None:
    section = model_section(*options, tiny=[])
    with torch.device("meta"):
        if message is None:
            checkpoint.build(section)
            return
        with pytest.raises(ValueError, match=message) as told:
            checkpoint.build(section)
    assert "Attention" not in str(told.value)
    assert "Features" not in str(told.value)
