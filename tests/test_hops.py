"""The way from the objective to the product of attention, as benchmarks/hops.py counts it, gets no longer."""

import runpy
from pathlib import Path

import pytest
import torch

HOPS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/hops.py"))
MOST = {  # files, functions: what was measured last, to be lowered with the code
    "favor": (20, 65),
    "delta": (21, 59),
    "flash": (11, 33),
    "linear": (21, 65),
    "relu": (21, 61),
    "hybrid": (21, 66),
}
SMALL = ["data.context=32", "model.depth=2", "model.dim=64", "model.heads=2"]  # the way is the same


@pytest.mark.parametrize("name", MOST)
def test_the_way_to_the_product_of_attention_gets_no_longer(name: str) -> None:
    files, functions = HOPS["count"](HOPS["trace"]([f"attn={name}", *SMALL]))
    assert files <= MOST[name][0]
    assert functions <= MOST[name][1]


def test_the_way_begins_at_the_objective_and_ends_where_scores_are_made() -> None:
    path = HOPS["trace"](["attn=exact", *SMALL])
    assert path[0].co_qualname == "Objective.__call__"
    assert path[-1].co_filename.endswith("performer_lm/ops/softmax.py")


def test_only_a_product_of_two_tensors_that_depend_on_the_batch_ends_the_way() -> None:
    x, weight = torch.randn(2, 3, 3), torch.randn(2, 3, 3)
    scratch = torch.empty(2, 3, 3)
    with HOPS["Watch"](x):
        assert (weight @ weight + x @ weight).shape == x.shape
        torch.baddbmm(weight, weight, weight)
        scratch.baddbmm_(x.exp(), weight)  # from here on it depends on the batch
        with pytest.raises(HOPS["Reached"]):
            scratch[:, 1:] @ x.mT
    with HOPS["Watch"](x), pytest.raises(HOPS["Reached"]):
        torch.nn.functional.scaled_dot_product_attention(x, x + 1, weight)
