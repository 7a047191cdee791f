"""Triton's kernels equal the definition in float64 and its gradients; their interpreter runs them on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from performer_lm.ops.linear import LinearState, causal_linear_attention, chunks, empty_state, naive
from performer_lm.ops.linear import state as linear_state
from performer_lm.ops.linear import triton as kernels
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.linear.triton import blocks, launch, outputs
from performer_lm.ops.maps import Exponential, Generalized, Maps
from performer_lm.ops.precision import LOG2_E

FLOAT32, GRADIENT = 2e-5, 1e-5
BFLOAT16 = 3e-2  # of numbers near 1: weights, values and their sums have eight bits each, as in SDPA

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of numbers that are selected away


def maps(w: Tensor, *bias: Tensor) -> tuple[Exponential, Exponential]:
    scale = w.shape[-1] ** -0.25
    query = Exponential((w, *bias), scale=scale)
    return query, Exponential(query.tensors, scale=scale, norm=0.5 * scale * scale)


def log_features(x: Tensor, a_map: Exponential) -> Tensor:
    """Return the natural log features `(b, h, n, m)` of x `(b, h, n, d)`."""
    weight, *bias = (tensor.repeat_interleave(x.shape[1] // len(tensor), dim=0) for tensor in a_map.tensors)
    logs = a_map.scale * x @ weight.mT - a_map.norm * x.square().sum(dim=-1, keepdim=True)
    return logs + bias[0][:, None] if bias else logs


def draw(
    n: int, *names: str, std: float = 1.0, d: int = 16, e: int = 16, m: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Any]]:
    """Draw queries, keys and values in float64 that `dtype` holds, a map's tensors, and what is named."""
    q, k, v = std * torch.randn(1, 2, n, d), std * torch.randn(1, 1, n, d), torch.randn(1, 1, n, e)
    tensors = (torch.randn(1, m, d), torch.randn(1, m)) if "bias" in names else (torch.randn(1, m, d),)
    chosen: dict[str, Any] = {}
    if "mask" in names:
        chosen["mask"] = torch.rand(1, n) > 0.3
    if "segments" in names:
        chosen["segments"] = (torch.rand(1, n) > 0.9).cumsum(dim=-1)
    if "log_decay" in names:
        chosen["log_decay"] = -torch.rand(1, 1, n)
    if "strong" in names:
        chosen["log_decay"] = -40.0 * torch.rand(1, 1, n)
    if "loud" in names:
        k[:, :, n // 2] *= 4.0
    return tuple(x.to(dtype).double() for x in (q, k, v)), tensors, chosen


def attend(qkv: tuple[Tensor, ...], tensors: tuple[Tensor, ...], kernel: str, dtype: torch.dtype, **chosen: Any) -> Any:
    """Return the output, the state's sums, and the gradients of a sum of both."""
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query_map, key_map = maps(*(x.to(wide) for x in tensors))
    state = empty_state(1, 1, len(tensors[0][0]), v.shape[-1], device=q.device, dtype=wide)
    leaves = [q, k, v]
    if "log_decay" in chosen:
        chosen["log_decay"] = chosen["log_decay"].to(wide).requires_grad_()
        leaves.append(chosen["log_decay"])
    out, after = causal_linear_attention(q, k, v, state, query_map=query_map, key_map=key_map, kernel=kernel, **chosen)
    means = after.sums[..., :-1].sum() / after.sums[..., -1].sum().detach()
    weights = torch.linspace(-1, 1, out.numel(), dtype=wide).view_as(out)
    grads = torch.autograd.grad((out.to(wide) * weights).sum() + 0.0 * means, leaves)
    return out.detach(), grads


CASES = [
    ((1,), {}),
    ((64,), {}),
    ((150, "mask", "segments", "log_decay", "bias"), {}),
    ((150, "strong", "mask"), {}),
    ((90,), {"d": 24, "e": 20, "m": 40}),
    ((70, "loud", "mask", "log_decay"), {"std": 8.0}),
]


@pytest.mark.parametrize(("arguments", "sizes"), CASES)
def test_kernels_equal_the_definition_and_its_gradients(arguments: Any, sizes: dict[str, Any]) -> None:
    qkv, tensors, chosen = draw(*arguments, **sizes)
    q, k, v = qkv
    query_map, key_map = maps(*(x.double() for x in tensors))
    decay = chosen.get("log_decay")
    wide = chosen if decay is None else {**chosen, "log_decay": decay.double()}
    expected = naive.quadratic(log_features(q, query_map), log_features(k, key_map), v, **wide)
    _, wanted = attend(qkv, tensors, "torch", torch.float64, **chosen)
    out, grads = attend(qkv, tensors, "triton", torch.float32, **chosen)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=FLOAT32)
    for found, grad in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found.double(), grad, rtol=0, atol=GRADIENT * max(1.0, float(grad.abs().max())))


def test_bfloat16_stays_near_float64() -> None:
    qkv, tensors, chosen = draw(130, "mask", "segments", "log_decay", dtype=torch.bfloat16)
    expected, wanted = attend(qkv, tensors, "torch", torch.float64, **chosen)
    out, grads = attend(qkv, tensors, "triton", torch.bfloat16, **chosen)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=BFLOAT16)
    for found, grad in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found.double(), grad, rtol=0, atol=BFLOAT16 * float(grad.abs().max()))


@pytest.mark.parametrize("split", [1, 64, 100])
def test_any_split_over_calls_gives_the_same(split: int) -> None:
    (q, k, v), tensors, _ = draw(130)
    query_map, key_map = maps(*tensors)
    q, k, v = (x.float() for x in (q, k, v))
    state = empty_state(1, 1, 32, 16, device=q.device, dtype=torch.float32)
    given = {"query_map": query_map, "key_map": key_map, "kernel": "triton"}
    with torch.no_grad():
        whole, after = causal_linear_attention(q, k, v, state, **given)
        pieces = []
        for part in (slice(0, split), slice(split, None)):
            piece, state = causal_linear_attention(*(x[:, :, part] for x in (q, k, v)), state, **given)
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=FLOAT32)
    scale = (state.exponent - after.exponent).exp2()[..., None]
    torch.testing.assert_close(state.sums * scale, after.sums.double(), rtol=1e-5, atol=1e-5)


def test_chunks_that_span_too_far_are_done_pair_by_pair_and_no_others() -> None:
    reach = blocks.REACH.value
    (q, k, v), tensors, _ = draw(130)
    k[:, :, 64:128] *= 30.0
    query_map, key_map = maps(*tensors)
    state = empty_state(1, 1, 32, 16, device=q.device, dtype=torch.float32)
    tokens = Tokens(*(x.float() for x in (q, k, v)), None, None, None, None)
    run = launch.Launch(
        Maps(query=query_map, key=key_map, groups=1), tokens, LinearState(*(x.flatten(0, 1) for x in state))
    )
    assert (run.spans.amax(dim=-1) > reach).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict.fromkeys(["query_map", "key_map"], Generalized((torch.randn(1, 32, 16),))), "exponential features"),
        ({"dtype": torch.float64}, "float32 at most"),
    ],
)
def test_kernels_are_refused_where_they_cannot(change: dict[str, Any], message: str) -> None:
    (q, k, v), tensors, _ = draw(8)
    dtype = change.pop("dtype", torch.float32)
    query_map, key_map = maps(*(x.to(dtype) for x in tensors))
    given = {"query_map": query_map, "key_map": key_map, "kernel": "triton", **change}
    state = empty_state(1, 1, 32, 16, device=q.device, dtype=dtype)
    with pytest.raises(ValueError, match=f"kernel=triton needs .*{message}.*: take kernel=auto"):
        causal_linear_attention(*(x.to(dtype) for x in (q, k, v)), state, **given)


def test_the_kernels_limits_are_those_of_the_engine() -> None:
    ours = (blocks.EMPTY, blocks.SHIFT, blocks.REACH, blocks.LOG2_E)
    assert [x.value for x in ours] == [linear_state.EMPTY, chunks.SHIFT, chunks.REACH, LOG2_E]
    assert outputs.REACH is blocks.REACH


GIVEN = (True, True, True, False, True, True, True)  # queries, keys, values, decay, mask and documents


def ask(**changes: Any) -> bool:
    """Ask whether kernels agree, on a CPU, where Triton's interpreter runs them."""
    asked = {"device": "cpu", "group": 2, "num_features": 32, "width": 16, "value_width": 16, "biased": False}
    kernels._agrees.cache_clear()
    return kernels._agrees(*(asked | changes).values(), GIVEN)


def test_the_first_use_finds_that_kernels_agree() -> None:
    assert ask()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Return what kernels gave for the numbers of a first use, which are always the same, once it was computed."""
    return {}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 2.0])
@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_the_first_use_finds_one_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, results: dict[str, Any], wrong: float, place: int
) -> None:
    def once(name: str) -> Callable[..., Any]:
        compute = getattr(launch, name)

        def computed(*given: Any, **options: Any) -> Any:
            if name not in results:
                results[name] = compute(*given, **options)
            return results[name]

        return computed

    right = once("pull")
    monkeypatch.setattr(launch, "attend", once("attend"))

    def spoiled(*given: Any) -> Any:
        found, *rest = right(*given)
        grads = [None if x is None else x.clone() for x in found]
        grads[place].flatten()[7] += wrong * grads[place].abs().max()
        return type(found)(*grads), *rest

    monkeypatch.setattr(launch, "pull", spoiled)
    with pytest.warns(
        UserWarning, match=r"goes on without Triton's kernels, which differ from PyTorch by (nan|inf|\d)"
    ):
        assert not ask()


def test_kernels_that_do_not_compile_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError("ptxas died\nof many reasons")

    monkeypatch.setattr(launch, "attend", fail)
    with pytest.warns(UserWarning, match=r"which failed \(RuntimeError: ptxas died\)$"):
        assert not ask()


def test_rows_too_far_apart_for_32_bits_are_brought_together() -> None:
    near = torch.empty(1, 2, 9, 4, device="meta")
    assert launch._rowwise(near) is near
    far = near.as_strided((1, 2, 9, 4), (0, 4, 2**28, 1))
    assert launch._rowwise(far).stride() == (72, 36, 4, 1)
