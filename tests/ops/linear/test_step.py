"""Decoding token by token is the block form, whatever is given beside it, and only looks where it may."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from performer_lm.ops.linear import LinearState, causal_linear_attention, empty_state
from performer_lm.ops.linear import step as linear_step
from performer_lm.ops.maps import BlockMap, Exponential, Generalized

B, H, G, D, M, E = 2, 4, 2, 3, 5, 4


def maps(name: str, dtype: torch.dtype) -> dict[str, BlockMap]:
    weight, bias = torch.randn(G, M, D, dtype=dtype), torch.randn(G, M, dtype=dtype)
    query_map, key_map = {
        "shared": (Exponential((weight, bias), scale=0.7), Exponential((weight, bias), scale=0.7, norm=0.2)),
        "apart": (Exponential((weight,)), Exponential((weight, bias))),
        "relu": (Generalized((weight,), activation="relu", epsilon=1e-3),) * 2,
    }[name]
    return {"query_map": query_map, "key_map": key_map}


def inputs(n: int, *, std: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    q, k, v = torch.randn(B, H, n, D), torch.randn(B, G, n, D), torch.randn(B, G, n, E)
    return [(std * q).to(dtype), (std * k).to(dtype), v.to(dtype)]


def empty(dtype: torch.dtype = torch.float64) -> LinearState:
    return empty_state(B, G, M, E, device=torch.device("cpu"), dtype=dtype)


def decode(tensors: list[Tensor], state: LinearState, **chosen: Any) -> tuple[Tensor, LinearState]:
    """Take one token after the other."""
    outputs, each = [], ("mask", "log_decay", "log_gain")
    for i in range(tensors[0].shape[2]):
        own = {name: x[..., i : i + 1] if name in each else x for name, x in chosen.items()}
        out, state = causal_linear_attention(*(x[:, :, i : i + 1] for x in tensors), state, **own)
        outputs.append(out)
    return torch.cat(outputs, dim=2), state


@pytest.mark.parametrize("std", [1.0, 10.0])
@pytest.mark.parametrize("name", ["shared", "apart", "relu"])
@given(n=st.integers(1, 9), names=st.sets(st.sampled_from(["mask", "log_decay", "log_gain"])), seed=st.integers(0, 99))
def test_steps_equal_the_block_form(name: str, std: float, n: int, names: set[str], seed: int) -> None:
    torch.manual_seed(seed)
    tensors, chosen = inputs(n, std=std), dict(maps(name, torch.float64))
    if "mask" in names:
        chosen["mask"] = torch.rand(B, n) > 0.4
    if "log_decay" in names:
        chosen["log_decay"] = -3 * torch.rand(B, G, n, dtype=torch.float64)
    if "log_gain" in names and name != "relu":
        chosen["log_gain"] = 5 * torch.randn(B, G, n, dtype=torch.float64)
    whole, after = causal_linear_attention(*tensors, empty(), chunk_size=4, **chosen)
    out, state = decode(tensors, empty(), **chosen)
    assert (out - whole).abs().max() < 1e-10
    same = (state.exponent - after.exponent).clamp(min=-500, max=500).exp2()[..., None] if name != "relu" else 1.0
    filled = after.sums[..., -1:] != 0
    assert torch.allclose(torch.where(filled, state.sums * same, 0.0), after.sums, rtol=1e-9, atol=1e-12)


def test_any_loudness_stays_near_float64() -> None:
    chosen, wide = maps("shared", torch.float32), inputs(40, std=10.0)
    wide[1][:, :, 7] *= 0.01  # a short key among long ones is the loud one
    wide[1][:, :, 19] *= 10.0
    out, _ = decode([x.float() for x in wide], empty(torch.float32), **chosen)
    expected, _ = causal_linear_attention(
        *wide, empty(), **{name: a_map.to(torch.float64) for name, a_map in chosen.items()}
    )
    assert (out - expected).abs().max() < 2e-5


def test_sums_move_only_where_a_key_rises_far(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, tensors = maps("shared", torch.float64), inputs(6)
    _, state = decode(tensors, empty(), **chosen)
    _, after = decode(inputs(6), state, **chosen)
    assert torch.equal(after.exponent, state.exponent)
    loud = {"log_gain": torch.full((B, G, 6), 200.0, dtype=torch.float64)}
    _, after = decode(inputs(6), state, **chosen, **loud)
    assert (after.exponent > state.exponent + 100).all()
    monkeypatch.setattr(linear_step, "ROOM", -torch.inf)  # as where the host may not look: at every token
    again, _ = decode(tensors, empty(), **chosen)
    monkeypatch.undo()
    assert torch.allclose(again, decode(tensors, empty(), **chosen)[0], atol=1e-12)


def test_decay_is_exact_over_a_long_stream() -> None:
    """Exponents take decay on for thousands of tokens, sums never do; the last keys still weigh what they should."""
    chosen, tensors = maps("shared", torch.float32), inputs(8, dtype=torch.float32)
    decay = torch.full((B, G, 1), -0.01)
    state, one = empty(torch.float32), [x[:, :, :1] for x in tensors]
    for _ in range(5000):
        _, state = causal_linear_attention(*one, state, log_decay=decay, consume=True, **chosen)
    sums = state.sums.double() * (state.exponent - state.exponent.amax()).exp2()[..., None]
    wide = [x.double() for x in one]
    lone_maps = {name: a_map.to(torch.float64) for name, a_map in chosen.items()}
    _, lone = causal_linear_attention(*wide, empty(), **lone_maps)
    lone_sums = lone.sums * (lone.exponent - state.exponent.amax()).exp2()[..., None]
    series = (1 - torch.tensor(-50.0).double().exp()) / (1 - torch.tensor(-0.01).double().exp())
    assert torch.allclose(sums, series * lone_sums, rtol=2e-5, atol=0)


def test_a_state_is_untouched_unless_given_away() -> None:
    chosen, tensors = maps("shared", torch.float64), inputs(2)
    _, state = decode(tensors, empty(), **chosen)
    before = state.sums.clone()
    one = [x[:, :, :1] for x in tensors]
    kept, _ = causal_linear_attention(*one, state, **chosen)
    assert torch.equal(state.sums, before)
    used, after = causal_linear_attention(*one, state, consume=True, **chosen)
    assert torch.equal(used, kept)
    assert after.sums.data_ptr() == state.sums.data_ptr()


def test_steps_run_without_looking_at_values() -> None:
    with torch.device("meta"):
        chosen, tensors = maps("shared", torch.float32), inputs(1, dtype=torch.float32)
        state = empty_state(B, G, M, E, device=torch.device("meta"), dtype=torch.float32)
        mask, decay = torch.ones(B, 1, dtype=torch.bool), torch.zeros(B, G, 1)
        out, after = causal_linear_attention(*tensors, state, mask=mask, log_decay=decay, **chosen)
    assert out.shape == (B, H, 1, E)
    assert after.exponent.shape == (B, G, M)
