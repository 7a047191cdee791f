"""Drawn attention calls, and the law that two forms of one operation agree in values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

Call = dict[str, Any]
EVERY = ("causal", "window", "mask", "key_mask", "bias", "segments", "log_decay", "scale", "dropout")


@st.composite
def draw_call(draw: st.DrawFn, options: tuple[str, ...] = EVERY, max_len: int = 17) -> Call:
    """Draw float64 q, k, v of any lengths and widths, grouped or not, and any of `options` together."""
    groups, repeats, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keys = draw(st.integers(1, max_len))
    queries = draw(st.integers(1, keys))
    width, value_width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads = groups * repeats
    chosen = {name for name in options if draw(st.booleans())}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random).requires_grad_()

    def coin(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) < 0.7

    call: Call = {
        "q": normal(batch, heads, queries, width),
        "k": normal(batch, groups, keys, width),
        "v": normal(batch, groups, keys, value_width),
    }
    if "causal" in chosen or "log_decay" in chosen:
        call["causal"] = True
    if "window" in chosen:
        call["window"] = draw(st.integers(1, max_len))
    if "mask" in chosen:
        call["mask"] = coin(*draw(st.sampled_from([(batch, heads, queries, keys), (heads, 1, keys), (queries, keys)])))
    if "key_mask" in chosen:
        call["key_mask"] = coin(batch, keys)
    if "bias" in chosen:
        call["bias"] = normal(
            *draw(st.sampled_from([(batch, heads, queries, keys), (1, heads, queries, keys), (queries, 1), (1, keys)]))
        )
    if "segments" in chosen:
        call["segments"] = (~coin(batch, keys)).long().cumsum(-1)
    if "log_decay" in chosen:
        log_decay = -torch.rand(batch, groups, keys, dtype=torch.float64, generator=random)
        call["log_decay"] = log_decay.requires_grad_()
    if "scale" in chosen:
        call["scale"] = draw(st.sampled_from([0.1, 1.0]))
    if "dropout" in chosen:
        call["dropout"], call["seed"] = 0.4, draw(st.integers(0, 2**40))
    return call


def values_and_gradients(attend: Callable[..., Tensor], call: Call, **more: Any) -> dict[str, Tensor]:
    """Return the output of one call and the gradient of a fixed function of it in every tensor that asks for one."""
    out = attend(**call, **more)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    inputs = {name: x for name, x in call.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad((out * direction).sum(), list(inputs.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(inputs.items(), grads, strict=True)
    }
    return {"out": out.detach(), **found}


def check_same(one: dict[str, Tensor], other: dict[str, Tensor], *, atol: float = 1e-9) -> None:
    """Assert that two results of `values_and_gradients` agree."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=atol, rtol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="session")
def calls() -> Callable[..., st.SearchStrategy[Call]]:
    return draw_call


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Assert that `fast(**call, **more)` equals `naive(**call)` in values and gradients."""

    def check(
        fast: Callable[..., Tensor], naive: Callable[..., Tensor], call: Call, *, atol: float = 1e-9, **more: Any
    ) -> None:
        check_same(values_and_gradients(fast, call, **more), values_and_gradients(naive, call), atol=atol)

    return check
