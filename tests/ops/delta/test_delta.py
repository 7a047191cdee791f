"""The delta rule in blocks equals its definition, token by token: any length, split, mask, documents and decay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from performer_lm.ops.delta import causal, delta_rule, empty_memory, naive
from performer_lm.ops.delta.walk import scan
from performer_lm.ops.linear import state as linear_state
from performer_lm.ops.maps import BlockMap, Exponential, Generalized

B, H, G, D, M, E = 2, 4, 2, 3, 5, 4
EVERY = ["mask", "segments", "log_decay"]
any_options = st.sets(st.sampled_from(EVERY))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_state, "CPU_TILE", 4)


Joined = Callable[[bool], None]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Joined:
    """Return a function that lets tiles join the memory one after the other, or at once, as on an accelerator."""

    def choose(at_once: bool) -> None:
        monkeypatch.setattr(
            causal,
            "choose_geometry",
            lambda *args, **more: linear_state.choose_geometry(*args, **more)._replace(one_scale=not at_once),
        )

    return choose


def make_map(name: str, tensors: tuple[Tensor, ...]) -> BlockMap:
    if name == "exponential":
        return Exponential(tensors, scale=0.7)
    return Generalized(tensors, activation=name, epsilon=1e-3 if name == "relu" else 0.0)


def draw(n: int, name: str = "exponential", *, std: float = 1.0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Draw all that a call takes; identity features have as many as a head is wide."""
    m = D if name == "identity" else M
    weight, bias = torch.randn(G, M, D), torch.randn(G, M)
    tensors = {"exponential": (weight, bias), "relu": (weight,)}.get(name, ())
    a_map = make_map(name, tuple(x.to(dtype) for x in tensors))
    return {
        "q": (std * torch.randn(B, H, n, D)).to(dtype),
        "k": (std * torch.randn(B, G, n, D)).to(dtype),
        "v": torch.randn(B, G, n, E).to(dtype),
        "beta": torch.rand(B, G, n).to(dtype),
        "memory": torch.randn(B, G, m, E).to(dtype),
        "query_map": a_map,
        "key_map": a_map,
    }


def options(n: int, names: set[str], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if "mask" in names:
        chosen["mask"] = torch.rand(B, n) > 0.3
    if "segments" in names:
        chosen["segments"] = (torch.rand(B, n) > 0.7).cumsum(dim=-1)
    if "log_decay" in names:
        chosen["log_decay"] = -2 * torch.rand(B, G, n, dtype=dtype)
    return chosen


def definition(call: dict[str, Any], **chosen: Any) -> tuple[Tensor, Tensor]:
    """Apply the definition in float64 to unit features, written as maps have them."""

    def features(x: Tensor, a_map: BlockMap) -> Tensor:
        grouped = x.unflatten(1, (G, -1)).transpose(0, 1)  # (g, b, r, n, d)
        values, logs = a_map.to(torch.float64)(grouped.flatten(1, 3))
        own = values if logs is None else logs
        assert own is not None
        return (
            naive.unit(own, logarithmic=logs is not None).unflatten(1, grouped.shape[1:4]).transpose(0, 1).flatten(1, 2)
        )

    wide = {name: call[name].double() for name in ("q", "k", "v", "beta", "memory")}
    queries, keys = features(wide["q"], call["query_map"]), features(wide["k"], call["key_map"])
    if "log_decay" in chosen:
        chosen["log_decay"] = chosen["log_decay"].double()
    return naive.recurrent(queries, keys, wide["v"], wide["beta"], wide["memory"], **chosen)


@pytest.mark.parametrize("name", ["exponential", "relu", "identity"])
@pytest.mark.parametrize("names", [set(), {"mask"}, {"segments"}, {"log_decay"}, set(EVERY)])
@pytest.mark.parametrize("n", [1, 3, 4, 13])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("at_once", [False, True])
def test_equals_the_definition(
    name: str, names: set[str], n: int, dtype: torch.dtype, tolerance: float, at_once: bool, joined: Joined
) -> None:
    joined(at_once)
    call, chosen = draw(n, name, dtype=dtype), options(n, names, dtype)
    tensors = ["q", "k", "v", "beta", "memory"]
    leaves = [call[x].requires_grad_() for x in tensors]
    if "log_decay" in chosen:
        leaves.append(chosen["log_decay"].requires_grad_())
    leaves.extend(x.requires_grad_() for x in call["key_map"].tensors)
    out, after = delta_rule(**call, **chosen, chunk_size=8)
    expected, expected_after = definition(call, **chosen)
    assert (out.dtype, after.dtype) == (dtype, dtype)
    assert (out - expected).abs().max() < tolerance
    assert (after - expected_after).abs().max() < tolerance
    weight, more = torch.randn_like(expected), torch.randn_like(expected_after)
    ours = torch.autograd.grad((out * weight).sum() + (after * more).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum() + (expected_after * more).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("name", ["exponential", "relu"])
def test_queries_may_have_a_map_of_their_own(name: str, at_once: bool, joined: Joined) -> None:
    joined(at_once)
    call = draw(13, name)
    call["query_map"] = make_map(name, tuple(torch.randn_like(x) for x in call["query_map"].tensors))
    leaves = [call[x].requires_grad_() for x in ("q", "k", "v", "beta", "memory")]
    leaves += [x.requires_grad_() for a_map in (call["query_map"], call["key_map"]) for x in a_map.tensors]
    results = [delta_rule(**call, chunk_size=8)[0], definition(call)[0]]
    weight = torch.randn_like(results[0])
    grads = [torch.autograd.grad((out * weight).sum(), leaves) for out in results]
    for one, other in zip([results[0], *grads[0]], [results[1], *grads[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@given(n=st.integers(1, 12), chunk_size=st.integers(1, 6), split=st.integers(0, 12), names=any_options)
def test_any_split_gives_the_same_outputs_and_memory(n: int, chunk_size: int, split: int, names: set[str]) -> None:
    call, chosen = draw(n), options(n, names - {"segments"})
    whole, final = delta_rule(**call, **chosen)
    memory, outputs = call["memory"], []
    for part in (slice(0, min(split, n)), slice(min(split, n), n)):
        if part.start == part.stop:
            continue
        some = {name: x[..., part] for name, x in chosen.items()}
        tokens = {name: call[name][:, :, part] for name in ("q", "k", "v", "beta")}
        out, memory = delta_rule(**{**call, **tokens, "memory": memory}, **some, chunk_size=chunk_size)
        outputs.append(out)
    assert (torch.cat(outputs, dim=2) - whole).abs().max() < 1e-10
    assert (memory - final).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["relu", "identity"])
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_tokens_without_features_and_of_any_length_are_as_defined(name: str, length: float) -> None:
    call = draw(9, name, dtype=torch.float32)
    if name == "relu":  # of two features, both are zero for many tokens
        weight = call["key_map"].tensors[0][:, :2]
        call["key_map"] = call["query_map"] = Generalized((weight,), activation="relu")
        call["memory"] = call["memory"][:, :, :2]
    for x in (call["q"], call["k"]):
        x[:, :, ::2] *= length
    given_ = [call[x].requires_grad_() for x in ("q", "k", "v", "beta", "memory")]
    results = [delta_rule(**call), definition(call)]
    wide = [[x.double() for x in torch.autograd.grad(out.square().sum(), given_)] for out, _ in results]
    assert (results[0][0] - results[1][0]).abs().max() < 1e-5
    for ours, theirs in zip(*wide, strict=True):
        scale = theirs.abs().amax(dim=(-1,), keepdim=True).clamp_min(1.0)  # a short vector has large gradients
        assert ((ours - theirs).abs() / scale).max() < 1e-4
    memory = call["memory"].detach().clone()
    with torch.no_grad():
        for i in range(9):
            tokens = {x: call[x][:, :, i : i + 1] for x in ("q", "k", "v", "beta")}
            out, memory = delta_rule(**{**call, **tokens, "memory": memory})
            assert (out - results[1][0][:, :, i : i + 1]).abs().max() < 1e-5


@pytest.mark.parametrize("std", [1.0, 10.0, 100.0])
def test_no_loudness_breaks_it_and_the_past_stays(std: float) -> None:
    call = draw(24, std=std, dtype=torch.float32)
    out, _ = delta_rule(**call, chunk_size=8)
    expected, _ = definition(call)
    assert (out - expected).abs().max() < 2e-5 * max(1.0, std / 10)  # a logarithm of 1000 has an ulp of 6e-5
    later = {**call, "k": call["k"].clone()}
    later["k"][:, :, 13:] *= 100.0
    changed, _ = delta_rule(**later, chunk_size=8)
    assert torch.equal(changed[:, :, :8], out[:, :, :8])
    assert torch.equal(changed[:, :, 8:12], out[:, :, 8:12])


def test_what_is_written_with_beta_one_reads_back() -> None:
    call = draw(9)
    call["beta"] = torch.ones_like(call["beta"])
    call["q"] = call["k"].repeat_interleave(H // G, dim=1)
    out, _ = delta_rule(**call)
    assert (out - call["v"].repeat_interleave(H // G, dim=1)).abs().max() < 1e-10


@pytest.mark.parametrize("names", [set(), {"mask", "log_decay"}])
def test_steps_equal_blocks_and_change_no_memory_but_their_own(names: set[str]) -> None:
    call, chosen = draw(6), options(6, names)
    whole, final = delta_rule(**call, **chosen)
    memory, outputs, given_memory = call["memory"], [], call["memory"].clone()
    for i in range(6):
        tokens = {name: call[name][:, :, i : i + 1] for name in ("q", "k", "v", "beta")}
        some = {name: x[..., i : i + 1] for name, x in chosen.items()}
        out, memory = delta_rule(**{**call, **tokens, "memory": memory}, **some, consume=i > 0)
        outputs.append(out)
    assert (torch.cat(outputs, dim=2) - whole).abs().max() < 1e-10
    assert (memory - final).abs().max() < 1e-10
    assert torch.equal(call["memory"], given_memory)


def test_gradcheck() -> None:
    call, chosen = draw(5), options(5, set(EVERY))
    names = ["q", "k", "v", "beta", "memory"]

    def both(decay: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        given_ = dict(zip(names, tensors, strict=True))
        return delta_rule(**{**call, **given_}, **{**chosen, "log_decay": decay}, chunk_size=4)

    leaves = [chosen["log_decay"], *(call[name] for name in names)]
    assert torch.autograd.gradcheck(both, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 24, 25, 47])
def test_runs_of_tiles_side_by_side_equal_one_after_the_other(t: int) -> None:
    steps, own = 0.3 * torch.randn(2, t, M, M, dtype=torch.float64), torch.randn(2, t, M, E, dtype=torch.float64)
    first = torch.randn(2, M, E, dtype=torch.float64)
    expected = [first]
    for tile in range(t):
        expected.append(own[:, tile] + steps[:, tile] @ expected[-1])
    last = scan(steps, own, first)
    torch.testing.assert_close(own, torch.stack(expected[1:], dim=1))
    torch.testing.assert_close(last, expected[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(dtype: torch.dtype) -> None:
    call = draw(20, std=10.0, dtype=dtype)
    call["memory"] = call["memory"].float()
    out, memory = delta_rule(**call)
    assert (out.dtype, memory.dtype) == (dtype, torch.float32)
    assert out.isfinite().all()


def test_it_runs_on_the_meta_device_and_looks_at_nothing() -> None:
    with torch.device("meta"):
        call = draw(13, dtype=torch.float32)
        more = {"mask": torch.ones(B, 13, dtype=torch.bool), "log_decay": torch.zeros(B, G, 13)}
        out, memory = delta_rule(**{**call, "q": call["q"].requires_grad_()}, **more)
        out.sum().backward()
    assert (out.shape, memory.shape) == ((B, H, 13, E), (B, G, M, E))


def test_a_compiled_call_has_no_break_and_the_same_gradients() -> None:
    call = draw(9, dtype=torch.float32)
    compiled = torch.compile(delta_rule, backend="aot_eager", fullgraph=True)
    results = []
    for function in (delta_rule, compiled):
        given_ = {**call, "q": call["q"].clone().requires_grad_(), "beta": call["beta"].clone().requires_grad_()}
        out, _ = function(**given_)
        results.append([out, *torch.autograd.grad(out.square().sum(), (given_["q"], given_["beta"]))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", torch.ones(B, G, 4), "beta must be floating point, one entry for each key head and token"),
        ("beta", torch.ones(B, G, 5, dtype=torch.int64), "beta must be floating point"),
        ("memory", torch.zeros(B + 1, G, M, E), "the state holds a batch of 3, got a batch of 2"),
        ("mask", torch.ones(1, 5, dtype=torch.bool), "mask must be bool or integer"),
    ],
)
def test_what_does_not_fit_is_one_line(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_rule(**{**draw(5), name: value})


def test_an_empty_memory_gives_nothing() -> None:
    call = draw(1)
    call["memory"] = empty_memory(B, G, M, E, device=torch.device("cpu"), dtype=torch.float64)
    call["beta"] = torch.zeros_like(call["beta"])
    out, memory = delta_rule(**call)
    assert not out.any()
    assert not memory.any()
