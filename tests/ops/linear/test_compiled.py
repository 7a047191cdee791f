"""A compiler sees linear attention as one operator, with the values and gradients of the eager one."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from performer_lm.ops.linear import LinearState, causal_linear_attention, empty_state
from performer_lm.ops.linear.operator import _attend, _pull
from performer_lm.ops.linear.state import Geometry
from performer_lm.ops.maps import BlockMap, Exponential, Generalized, Maps

compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)  # a graph break is an error


def maps(name: str, width: int = 3, *, wanted: bool = False) -> tuple[BlockMap, BlockMap]:
    weight = torch.randn(2, 4, width, dtype=torch.float64, requires_grad=wanted)
    if name == "relu":
        return (Generalized((weight,), activation="relu", epsilon=1e-3),) * 2
    return Exponential((weight,), scale=0.5), Exponential((weight,), scale=0.5, norm=0.1)


def inputs(n: int) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(2, 4, n, 3), torch.randn(2, 2, n, 3), torch.randn(2, 2, n, 5)
    return tuple(x.double().requires_grad_() for x in (q, k, v))


def options(n: int, *, everything: bool) -> dict[str, Tensor]:
    if not everything:
        return {}
    decay = -torch.rand(2, 2, n, dtype=torch.float64)
    return {
        "mask": torch.rand(2, n) > 0.3,
        "segments": (torch.rand(2, n) > 0.8).cumsum(dim=-1),
        "log_decay": decay.requires_grad_(),
        "log_gain": torch.randn(2, 2, n, dtype=torch.float64).requires_grad_(),
    }


def start() -> LinearState:
    return empty_state(2, 2, 4, 5, device=torch.device("cpu"), dtype=torch.float64)


@pytest.mark.parametrize(  # each two of the three together
    ("name", "wanted", "everything"),
    [("softmax", False, False), ("softmax", True, True), ("relu", False, True), ("relu", True, False)],
)
def test_compiled_attention_is_the_eager_one(name: str, wanted: bool, everything: bool) -> None:
    query_map, key_map = maps(name, wanted=wanted)
    tensors, chosen = inputs(11), options(11, everything=everything)
    if name == "relu":
        chosen.pop("log_gain", None)
    leaves = [*tensors, *(x for x in chosen.values() if x.requires_grad), *(query_map.tensors if wanted else ())]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, state = causal_linear_attention(
            q, k, v, start(), query_map=query_map, key_map=key_map, chunk_size=4, **chosen
        )
        return out, state.sums

    found, expected = compiled(attend)(*tensors), attend(*tensors)
    weights = [torch.randn_like(x) for x in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    ours, theirs = (torch.autograd.grad(out, leaves, weights) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_compiled_steps_are_the_eager_ones() -> None:
    """The host does not look at a key while a compiler does: sums are put on higher exponents at every token."""
    query_map, key_map = maps("softmax")

    def step(q: Tensor, k: Tensor, v: Tensor, state: LinearState, decay: Tensor) -> tuple[Tensor, LinearState]:
        return causal_linear_attention(q, k, v, state, query_map=query_map, key_map=key_map, log_decay=decay)

    fast, one, other = compiled(step), start(), start()
    for _ in range(4):
        q, k, v = (20 * x.detach() for x in inputs(1))
        decay = -torch.rand(2, 2, 1, dtype=torch.float64)
        out, one = fast(q, k, v, one, decay)
        expected, other = step(q, k, v, other, decay)
        assert torch.allclose(out, expected, atol=1e-10)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("geometry", [Geometry(2, 4, True), Geometry(2, 4, False, triton=True)])
def test_operators_keep_what_they_promise(geometry: Geometry, keep: bool) -> None:
    query_map, key_map = maps("softmax", wanted=not geometry.triton)
    pair = Maps(query=query_map, key=key_map, groups=2)
    before = LinearState(*(x.transpose(0, 1).flatten(0, 1) for x in start()))
    leaves = [*inputs(7), *before, *pair.tensors]
    if geometry.triton:
        leaves = [x if x is before.exponent else x.detach().float().requires_grad_() for x in leaves]
    arguments: tuple[Any, ...] = (leaves, "xxx----xxxx", pair.code, *geometry, keep)
    torch.library.opcheck(_attend, arguments, test_utils=("test_schema", "test_faketensor"))
    if keep:
        trace = [x.detach() for x in _attend(*arguments)]
        grads = [torch.randn_like(x) for x in (trace[0], trace[1], trace[-1])]
        plain = [x.detach() for x in leaves]
        torch.library.opcheck(
            _pull,
            (plain, trace, grads, arguments[1], "xxx", *arguments[2:7], not geometry.triton),
            test_utils=("test_schema", "test_faketensor"),
        )
