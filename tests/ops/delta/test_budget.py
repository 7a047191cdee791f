"""The delta rule stays within budgets of kernels on an accelerator, counted on `meta`."""

import runpy
from collections import Counter
from pathlib import Path

import torch

from performer_lm.ops.delta.blocks import Writes
from performer_lm.ops.delta.sequence import attend, pull
from performer_lm.ops.linear.state import choose_geometry
from performer_lm.ops.maps import Exponential, Maps

Kernels = runpy.run_path(str(Path(__file__).parents[1] / "linear" / "test_budget.py"))["Kernels"]
B, H, D, M = 8, 16, 64, 128


def count(n: int) -> Counter[str]:
    """Count the kernels of the forward and the backward of one layer, with decay."""
    with torch.device("meta"):
        q, k, v = torch.randn(3, B, H, n, D).unbind()
        weight, memory = torch.randn(H, M, D), torch.zeros(B, H, M, D)
        beta, log_decay = torch.zeros(2, B, H, n).unbind()
    a_map = Exponential((weight,), scale=D**-0.25)
    maps, geometry = Maps(query=a_map, key=a_map, groups=H), choose_geometry(memory, block=None)
    tokens, before = Writes(q, k, v, beta, log_decay, None, None), memory.flatten(0, 1)
    with torch.no_grad(), Kernels() as found:
        trace = attend(maps, geometry, tokens, before, keep=True)
        pull(maps, geometry, tokens, trace, trace[0], None, wanted=False)
    return found.counts


def test_a_layer_launches_few_kernels() -> None:
    counts = count(2048)
    assert sum(counts.values()) <= 260, counts


def test_a_further_tile_costs_less_than_a_kernel() -> None:
    tiles = 2048 // 64
    short, long = (sum(count(n).values()) for n in (2048, 4096))
    assert (long - short) / tiles < 0.5
