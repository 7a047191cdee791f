"""The engine stays within budgets of kernels and bytes on an accelerator, counted on `meta`, and looks at no values."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from performer_lm.ops.linear.sequence import attend, pull
from performer_lm.ops.linear.state import LinearState, choose_geometry, empty_state
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.maps import Exponential, Maps

B, H, D, M = 8, 16, 64, 128
VIEWS = {"view", "_unsafe_view", "transpose", "expand", "permute", "select", "slice", "unsqueeze", "squeeze", "alias"}
VIEWS |= {"t", "unbind", "detach", "unfold", "as_strided", "split_with_sizes"}


class Kernels(TorchDispatchMode):
    """Count the operations that an accelerator would launch, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name not in VIEWS and "empty" not in name:
            self.counts[name] += 1
            read = {key: value for key, value in kwargs.items() if key != "out"}
            for x in tree_leaves((args, read, result)):
                if isinstance(x, Tensor):
                    held = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
                    self.bytes += torch.Size(held).numel() * x.element_size()
        return result


def count(n: int, *, decay: bool) -> Kernels:
    """Count the forward and the backward of one layer."""
    with torch.device("meta"):
        q, k, v = torch.randn(3, B, H, n, D).unbind()
        weight, scale = torch.randn(H, M, D), D**-0.25
        state = empty_state(B, H, M, D, device=torch.device("meta"), dtype=torch.float32)
        log_decay = torch.zeros(B, H, n) if decay else None
    geometry = choose_geometry(state.sums, block=None)
    query, key = Exponential((weight,), scale=scale), Exponential((weight,), scale=scale, norm=0.1)
    maps = Maps(query=query, key=key, groups=H)
    tokens, before = Tokens(q, k, v, None, log_decay, None, None), LinearState(*(x.flatten(0, 1) for x in state))
    with torch.no_grad(), Kernels() as found:
        trace = attend(maps, geometry, tokens, before, keep=True)
        pull(maps, geometry, tokens, trace, (trace.out, None, None), wanted=False)
    return found


@pytest.mark.parametrize(("decay", "kernels", "share"), [(False, 260, 33), (True, 340, 36)])
def test_a_layer_launches_few_kernels_and_moves_few_bytes(decay: bool, kernels: int, share: int) -> None:
    found = count(2048, decay=decay)
    least = 8 * 4 * B * H * 2048 * D  # q, k, v, the output and their gradients once
    assert sum(found.counts.values()) <= kernels, found.counts
    assert found.bytes <= share * least, found.bytes / least


def test_a_further_tile_costs_few_kernels() -> None:
    tiles = 2048 // 64
    short, long = (sum(count(n, decay=True).counts.values()) for n in (2048, 4096))
    assert (long - short) / tiles <= 4


def test_nothing_looks_at_values_or_leaves_the_device() -> None:
    found = count(256, decay=True).counts
    assert not {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero"} & set(found)
