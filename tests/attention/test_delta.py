"""Where there is no order of tokens, the delta rule is refused by name before anything is built."""

from collections.abc import Callable
from typing import Any

import pytest

from performer_lm import checkpoint

Section = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("attn", [["attn=delta"], ["attn=hybrid", "attn.pattern=[flash,delta]"]])
@pytest.mark.parametrize("model", ["performer_encoder", "performer_seq2seq"])
def test_an_encoder_refuses_it_and_names_those_that_look_both_ways(
    attn: list[str], model: str, model_section: Section
) -> None:
    section = model_section(f"model={model}", *attn, tiny=[])
    with pytest.raises(ValueError, match="attn=delta is causal only; attn=favor, exact, chunked and flash"):
        checkpoint.build(section)


@pytest.mark.parametrize("attn", [["attn=delta"], ["attn=hybrid", "attn.pattern=[flash,delta]"]])
def test_cross_attention_refuses_it_and_names_what_attends_across(attn: list[str], model_section: Section) -> None:
    section = model_section("model=performer_seq2seq", *attn, tiny=[])
    section["encoder"] = model_section("model=performer_seq2seq", "attn=flash", tiny=[])["encoder"]
    with pytest.raises(
        ValueError, match="attn=delta does not attend across sequences; favor, exact, chunked and flash do"
    ):
        checkpoint.build(section)
