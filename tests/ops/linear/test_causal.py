"""Linear attention in blocks equals its quadratic definition: any length, split, mask, documents and decay."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from performer_lm.ops.linear import LinearState, absorb_keys, causal_linear_attention, empty_state, naive, read_state
from performer_lm.ops.linear import chunks as linear_chunks
from performer_lm.ops.linear import operator as linear_operator
from performer_lm.ops.linear import state as linear_state
from performer_lm.ops.linear.tokens import count_parts, cut
from performer_lm.ops.maps import Exponential

FLOAT64 = 1e-10
FLOAT32 = 2e-6


def identity(x: Tensor) -> Exponential:
    """Take vectors like x as log features themselves."""
    return Exponential((torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).repeat(2, 1, 1),))


def quadratic(q: Tensor, k: Tensor, v: Tensor, **chosen: Any) -> Tensor:
    """Attend by the definition in float64."""
    return naive.quadratic(*(x.double() for x in (q, k, v)), **chosen)


def inputs(n: int, *, std: float = 1.0, dtype: torch.dtype = torch.float64, m: int = 5) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(2, 4, n, m), torch.randn(2, 2, n, m), torch.randn(2, 2, n, 3)
    return (std * q).to(dtype), (std * k).to(dtype), v.to(dtype)


def options(n: int, names: set[str], dtype: torch.dtype) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if "mask" in names:
        chosen["mask"] = torch.rand(2, n) > 0.3
    if "segments" in names:
        chosen["segments"] = (torch.rand(2, n) > 0.8).cumsum(dim=-1)
    if "log_decay" in names:
        chosen["log_decay"] = -torch.rand(2, 2, n, dtype=dtype)
    return chosen


def empty(q: Tensor, k: Tensor, v: Tensor) -> LinearState:
    return empty_state(2, k.shape[1], k.shape[-1], v.shape[-1], device=k.device, dtype=k.dtype)


def blockwise(
    q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int | None = 4, **chosen: Any
) -> tuple[Tensor, LinearState]:
    state = chosen.pop("state", None) or empty(q, k, v)
    return causal_linear_attention(
        q, k, v, state, query_map=identity(q), key_map=identity(k), chunk_size=chunk_size, **chosen
    )


@pytest.fixture(params=["one tile a block", "several", "at once", "exact"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with blocks of one tile, of several on one scale, of several on their own, and pair by pair."""
    if request.param != "one tile a block":
        monkeypatch.setattr(linear_state, "CPU_TILE", 2)
    if request.param == "at once":  # as on an accelerator
        choose = linear_state.choose_geometry
        monkeypatch.setattr(
            linear_operator, "choose_geometry", lambda *a, **k: choose(*a, **k)._replace(one_scale=False)
        )
    if request.param == "exact":
        monkeypatch.setattr(linear_chunks, "REACH", -1.0)
    return str(request.param)


any_options = st.sets(st.sampled_from(["mask", "segments", "log_decay"]))
form_laws = pytest.mark.usefixtures("form")


@form_laws
@pytest.mark.parametrize("names", [set(), {"mask"}, {"segments"}, {"log_decay"}, {"mask", "segments", "log_decay"}])
@pytest.mark.parametrize("n", [1, 3, 4, 13])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_equals_the_quadratic_form(n: int, names: set[str], dtype: torch.dtype, tolerance: float) -> None:
    tensors = [x.requires_grad_() for x in inputs(n, dtype=dtype)]
    chosen = options(n, names, dtype)
    out, _ = blockwise(*tensors, **chosen)
    reference = [x.detach().double().requires_grad_() for x in tensors]
    expected = quadratic(*reference, **chosen)
    assert out.dtype == dtype
    assert (out - expected).abs().max() < tolerance
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((out * weight.to(dtype)).sum(), tensors)
    theirs = torch.autograd.grad((expected * weight).sum(), reference)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 10 * tolerance  # gradients here reach 10


@form_laws
@given(n=st.integers(1, 12), chunk_size=st.integers(1, 6), split=st.integers(0, 12), names=any_options)
def test_any_split_gives_the_same_outputs_and_state(n: int, chunk_size: int, split: int, names: set[str]) -> None:
    tensors = inputs(n)
    chosen = options(n, names - {"segments"}, torch.float64)
    whole, final = blockwise(*tensors, **chosen)
    state, outputs = empty(*tensors), []
    for part in (slice(0, min(split, n)), slice(min(split, n), n)):
        if part.start == part.stop:
            continue
        some = {name: x[..., part] for name, x in chosen.items()}
        out, state = blockwise(*(x[..., part, :] for x in tensors), chunk_size=chunk_size, state=state, **some)
        outputs.append(out)
    assert (torch.cat(outputs, dim=-2) - whole).abs().max() < FLOAT64
    scale = (state.exponent - final.exponent).exp2()[..., None]
    assert torch.allclose(state.sums * scale, final.sums, atol=FLOAT64)


@form_laws
@pytest.mark.parametrize("std", [1.0, 3.0, 10.0, 100.0])
def test_a_loud_key_moves_nothing_before_it(std: float) -> None:
    """In log features of a range no float could hold, a key far above all others comes late in a chunk."""
    q, k, v = inputs(32, std=std, dtype=torch.float32)
    k[:, :, 13] += 500.0
    out, _ = blockwise(q, k, v, chunk_size=16)
    assert (out - quadratic(q, k, v)).abs().max() < 2e-5
    later = k.clone()
    later[:, :, 20:] = 10 * torch.randn_like(later[:, :, 20:])
    changed, _ = blockwise(q, later, v, chunk_size=16)
    assert torch.equal(changed[..., :16, :], out[..., :16, :])
    assert (changed[..., 16:20, :] - out[..., 16:20, :]).abs().max() < 2e-5


@form_laws
@pytest.mark.parametrize("span", [60, 100, 119, 120, 121, 140, 160, 180, 240])  # factors of 2, around REACH
@pytest.mark.parametrize("shape", ["late keys are louder", "in turn", "each feature at its own time", "one falls"])
def test_keys_far_apart_in_loudness_are_exact(span: int, shape: str) -> None:
    """On one scale or pair by pair, what comes later in a chunk moves the past by rounding at most."""
    q, k, v = inputs(32, dtype=torch.float32)
    at = torch.arange(32)[:, None]
    louder = {
        "late keys are louder": (at >= 11).expand(32, 5),
        "in turn": (at % 2 == 1).expand(32, 5),
        "each feature at its own time": at >= 3 + 6 * torch.arange(5),
        "one falls": torch.where(torch.arange(5) == 1, (at < 11) & (at % 2 == 1), at >= 11),
    }[shape]
    k = k + span * torch.log(torch.tensor(2.0)) * louder
    if shape == "one falls":  # and weighs as little as may just be lost: the worst case of `chunks.py`
        q[..., 1] -= 192 * torch.log(torch.tensor(2.0))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out, _ = blockwise(*tensors, chunk_size=16)
    reference = [x.detach().double().requires_grad_() for x in tensors]
    expected = quadratic(*reference)
    assert (out - expected).abs().max() < 2e-5
    ours, theirs = (torch.autograd.grad(x.square().sum(), xs) for x, xs in ((out, tensors), (expected, reference)))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    quiet, _ = blockwise(q, torch.where(at > 7, torch.full_like(k, -200.0), k), v, chunk_size=16)
    assert (quiet[:, :, :8] - out[:, :, :8]).abs().max() < 2e-5


@form_laws
@pytest.mark.parametrize("name", ["none", "log_decay", "segments"])
def test_a_masked_token_before_a_loud_key_sees_what_came_before(name: str) -> None:
    """It has no key of its own to see, so the state is all there is, however quiet beside what follows."""
    q, k, v = inputs(16, dtype=torch.float32)
    k[:, :, 9:] += 300.0
    mask = torch.arange(16).expand(2, -1) != 8
    chosen: dict[str, Any] = {"mask": mask}
    if name == "log_decay":
        chosen["log_decay"] = -10 * torch.rand(2, 2, 16)
    if name == "segments":
        chosen["segments"] = torch.zeros(2, 16, dtype=torch.int64)
    out, _ = blockwise(q, k, v, chunk_size=8, **chosen)
    assert (out - quadratic(q, k, v, **chosen)).abs().max() < 2e-5


@form_laws
def test_strong_decay_is_exact() -> None:
    q, k, v = inputs(64, dtype=torch.float32)
    log_decay = -20 * torch.rand(2, 2, 64)
    out, state = blockwise(q, k, v, chunk_size=16, log_decay=log_decay)
    assert (out - quadratic(q, k, v, log_decay=log_decay)).abs().max() < 2e-5
    assert state.sums.isfinite().all()


@form_laws
def test_a_quiet_document_after_a_loud_one() -> None:
    q, k, v = inputs(24, dtype=torch.float32)
    segments = torch.arange(24).div(5, rounding_mode="floor").expand(2, -1)
    k = k + 200.0 * (segments % 2)[:, None, :, None]
    out, _ = blockwise(q, k, v, chunk_size=8, segments=segments)
    for document in segments[0].unique():
        rows = segments[0] == document
        alone, _ = blockwise(*(x[:, :, rows] for x in (q, k, v)), chunk_size=8)
        assert (out[:, :, rows] - alone).abs().max() < 2e-5


@form_laws
def test_rows_that_see_nothing_are_zero() -> None:
    tensors = [x.requires_grad_() for x in inputs(9)]
    mask = torch.arange(9).expand(2, -1) >= torch.tensor([[6], [9]])
    out, _ = blockwise(*tensors, mask=mask)
    assert (out[0, :, :6] == 0).all()
    assert (out[1] == 0).all()
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)


@pytest.mark.parametrize("masked", [False, True])
def test_reading_equals_the_quadratic_form(masked: bool) -> None:
    q, k, v = inputs(11)
    q = q[:, :, :7]
    mask = torch.rand(2, 11) > 0.3 if masked else None
    state = absorb_keys(k, v, empty(q, k, v), key_map=identity(k), chunk_size=4, mask=mask)
    out = read_state(q, state, query_map=identity(q), chunk_size=3)
    assert (out - quadratic(q, k, v, causal=False, mask=mask)).abs().max() < FLOAT64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(dtype: torch.dtype) -> None:
    tensors = [x.requires_grad_() for x in inputs(20, std=10.0, dtype=dtype)]
    out, state = blockwise(*tensors)
    assert out.dtype == dtype
    assert state.sums.dtype == torch.float32
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)


@form_laws
@pytest.mark.parametrize("names", [set(), {"mask", "log_decay", "segments"}])
def test_gradcheck(names: set[str]) -> None:
    """Through the state as well: what is absorbed now is read later."""
    tensors = [x[:1, :2, :4].contiguous().requires_grad_() for x in inputs(4, m=2)]
    chosen = {name: x[:1] for name, x in options(4, names, torch.float64).items()}
    decay = [chosen.pop("log_decay").requires_grad_()] if "log_decay" in chosen else []
    state = empty_state(1, 2, 2, 3, device=tensors[0].device, dtype=torch.float64)
    _, state = blockwise(*(x.detach() for x in tensors), state=state)

    def both(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, *decay: Tensor) -> tuple[Tensor, ...]:
        more = {"log_decay": decay[0]} if decay else {}
        out, after = blockwise(q, k, v, chunk_size=3, state=LinearState(sums, state.exponent), **chosen, **more)
        later, _ = blockwise(q, k, v, state=after)
        return out, later

    assert torch.autograd.gradcheck(both, (*tensors, state.sums.requires_grad_(), *decay))


def test_no_features_are_kept_for_the_backward() -> None:
    n, m, e = 256, 5, 3
    q, k, v = (x.requires_grad_() for x in inputs(n))
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        blockwise(q, k, v, chunk_size=64)
    b, h, g = 2, 4, 2
    states = n // 64 * b * g * m * (e + 2)
    assert sum(kept.values()) <= b * n * (h + g) * m + b * n * (g + h) * e + b * n * h + 2 * states + 100


def test_runs_without_looking_at_values() -> None:
    with torch.device("meta"):
        q, k, v = inputs(13)
        out, state = blockwise(q, k, v, mask=torch.ones(2, 13, dtype=torch.bool), log_decay=torch.zeros(2, 2, 13))
    assert out.shape == (2, 4, 13, 3)
    assert state.sums.shape == (2, 2, 5, 4)


@pytest.mark.parametrize("backward", [True, False])
def test_how_many_tokens_a_block_has_moves_results_by_rounding_only(backward: bool) -> None:
    tensors = [x.requires_grad_(backward) for x in inputs(300)]
    out, _ = blockwise(*tensors, chunk_size=None)
    assert (out - quadratic(*tensors)).abs().max() < FLOAT64


def test_the_parts_of_a_cut_are_counted_without_cutting() -> None:
    for tile, tiles, n in product((1, 3, 32), (1, 2, 4), range(300)):
        assert count_parts(n, tile * tiles, tile) == len([*cut(n, tile * tiles, tile)])
