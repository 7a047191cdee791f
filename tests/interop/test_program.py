"""A model as a program of torch.export gives the model's own outputs, for any batch and length."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from performer_lm.attention.base import fork
from performer_lm.interop.export.program import export_forward, export_step
from performer_lm.model import PerformerLM

Build = Callable[..., PerformerLM]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
LINEAR = [
    "favor",
    "relu",
    "linear",
    "delta",
    "local",
    "local attn.window=100",
    "local attn.window=4",
    "local attn.window=4 attn.sinks=2",
]


@pytest.mark.slow
@pytest.mark.parametrize("attn", [*LINEAR, "flash", "hybrid"])
def test_the_program_of_a_forward_takes_any_batch_and_length(attn: str, lively_model: Build, tmp_path: Path) -> None:
    model = lively_model(*f"attn={attn}".split(), "model.depth=1")
    torch.export.save(export_forward(model), tmp_path / "forward.pt2")
    program = torch.export.load(tmp_path / "forward.pt2").module()
    for shape in ((1, 4), (2, 31), (5, 130)):
        tokens = torch.randint(40, shape)
        with torch.no_grad():
            torch.testing.assert_close(program(tokens), model(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("attn", LINEAR)
def test_the_program_of_a_step_decodes_what_the_model_does(attn: str, lively_model: Build) -> None:
    model = lively_model(*f"attn={attn}".split(), "model.depth=1")
    program = export_step(model).module()
    tokens = torch.randint(40, (2, 12))
    with torch.no_grad():
        _, state = model.start(tokens[:, :9])
        own = fork(state)
        for place in range(9, 12):
            logits, state = program(tokens[:, place : place + 1], state)
            expected, own = model.extend(tokens[:, place : place + 1], own)
            torch.testing.assert_close(logits, expected)


def test_a_step_whose_state_grows_is_refused(lively_model: Build) -> None:
    with pytest.raises(ValueError, match="cache of keys grows"):
        export_step(lively_model("attn=flash", "model.depth=1"))
