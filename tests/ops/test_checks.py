"""Every function takes bool and integer masks alike, and refuses masks, documents, decay and bias that do not fit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from performer_lm import ops
from performer_lm.ops.checks import check_bias, check_mask, check_pair_mask
from performer_lm.ops.maps import Exponential

B, H, G, N, D, E = 2, 4, 2, 6, 3, 5
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
MAP = Exponential((torch.eye(D, dtype=torch.float64).repeat(G, 1, 1),))
Attend = Callable[..., Tensor]


def causal_linear(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **more: Any) -> Tensor:
    state = ops.empty_state(B, G, D, E, device=q.device, dtype=q.dtype)
    return ops.causal_linear_attention(q, k, v, state, query_map=MAP, key_map=MAP, mask=key_mask, **more)[0]


def linear_step(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **more: Any) -> Tensor:
    """Attend token by token, without gradients."""
    state, outputs = ops.empty_state(B, G, D, E, device=q.device, dtype=q.dtype), []
    given = {"mask": key_mask, **more}
    for at in range(q.shape[2]):
        part = slice(at, at + 1)
        own = {name: None if x is None else x[..., part] for name, x in given.items()}
        q_own, k_own, v_own = (x[:, :, part] for x in (q, k, v))
        out, state = ops.causal_linear_attention(q_own, k_own, v_own, state, query_map=MAP, key_map=MAP, **own)
        outputs.append(out)
    return torch.cat(outputs, 2)


def linear_documents(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **more: Any) -> Tensor:
    segments = more.pop("segments", torch.zeros(B, N, dtype=torch.int64))
    return ops.bidirectional_linear_attention(q, k, v, segments, query_map=MAP, key_map=MAP, mask=key_mask, **more)


def linear_reading(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    state = ops.empty_state(B, G, D, E, device=q.device, dtype=q.dtype)
    return ops.read_state(q, ops.absorb_keys(k, v, state, key_map=MAP, mask=key_mask), query_map=MAP)


SOFTMAX: dict[str, Attend] = {
    "exact": ops.exact_attention,
    "chunked": partial(ops.chunked_attention, query_chunk_size=2, key_chunk_size=4),
    "tiled": partial(ops.tiled_attention, on_chip=60),
    "sdpa": ops.sdpa_attention,
}
CAUSAL: dict[str, Attend] = {
    **{name: partial(attend, causal=True) for name, attend in SOFTMAX.items()},
    "local": partial(ops.local_attention, window=3, causal=True),
    "causal linear": causal_linear,
}
BOTH_WAYS: dict[str, Attend] = {
    **SOFTMAX,
    "local": partial(ops.local_attention, window=3),
    "linear documents": linear_documents,
    "linear reading": linear_reading,
}
ALL = {f"{name}, causal": attend for name, attend in CAUSAL.items()} | BOTH_WAYS | {"linear step": linear_step}

every_function = pytest.mark.parametrize("attend", ALL.values(), ids=ALL)
every_softmax = pytest.mark.parametrize("attend", SOFTMAX.values(), ids=SOFTMAX)
takes_segments = pytest.mark.parametrize(
    "attend", [attend for name, attend in ALL.items() if name not in ("linear reading", "linear step")]
)


def draw() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(B, heads, N, width).double() for heads, width in ((H, D), (G, D), (G, E)))  # type: ignore[return-value]


def draw_mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.6


@pytest.mark.parametrize("dtype", INTEGERS)
def test_an_integer_mask_is_the_bool_mask(dtype: torch.dtype) -> None:
    mask = draw_mask(3, 4)
    assert torch.equal(check_mask(mask.to(dtype), (3, 4)), mask)
    assert torch.equal(check_pair_mask(mask.to(dtype), (2, 3, 4)), mask)
    assert check_mask(None, (3, 4)) is None


def test_a_bool_mask_is_not_copied() -> None:
    mask = draw_mask(3, 4)
    assert check_mask(mask, (3, 4)) is mask


@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (4,), (3, 5), (1, 3, 4), ()])
def test_a_mask_of_other_tokens_is_refused_in_one_line(shape: tuple[int, ...]) -> None:
    wanted = r"^context_mask must be bool or integer, .* of shape \(3, 4\); got bool of shape \(.*\)$"
    with pytest.raises(ValueError, match=wanted):
        check_mask(draw_mask(*shape), (3, 4), name="context_mask")


@every_function
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integer_key_masks_equal_bool_ones(attend: Attend, dtype: torch.dtype) -> None:
    tensors, mask = draw(), draw_mask(B, N)
    assert torch.equal(attend(*tensors, key_mask=mask.to(dtype)), attend(*tensors, key_mask=mask))
    assert not torch.allclose(attend(*tensors, key_mask=mask), attend(*tensors))


@every_function
@pytest.mark.parametrize(
    "mask",
    [torch.ones(B, N), torch.ones(B, N) * 1j, torch.ones(1, N) > 0, torch.ones(N) > 0, torch.ones(B, 1, N) > 0],
    ids=["float", "complex", "one row", "no batch", "per head"],
)
def test_key_masks_that_do_not_fit_are_refused(attend: Attend, mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^(key_)?mask must be bool or integer, .* of shape \(2, [16]\); got "):
        attend(*draw(), key_mask=mask)


@takes_segments
@pytest.mark.parametrize(
    "segments",
    [torch.zeros(B, N), torch.zeros(B, N) > 0, torch.zeros(1, N).long(), torch.zeros(N).long()],
    ids=["float", "bool", "one row", "no batch"],
)
def test_segments_that_do_not_fit_are_refused(attend: Attend, segments: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^segments must be integer, .* of shape \(2, 6\); got "):
        attend(*draw(), segments=segments)


@pytest.mark.parametrize("attend", CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize(
    "decay",
    [torch.zeros(B, G, N).long(), torch.zeros(B, 1, N), torch.zeros(1, G, N), torch.zeros(B, H, N), torch.zeros(B, N)],
    ids=["integer", "one head", "one row", "query heads", "no heads"],
)
def test_decay_that_does_not_fit_is_refused(attend: Attend, decay: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^log_decay must be floating point, .* of shape \(2, 2, 6\); got "):
        attend(*draw(), log_decay=decay)


@every_softmax
@pytest.mark.parametrize("shape", [(B, H, N, N), (H, N, N), (B, 1, 1, N), (N, 1), (1,)])
@pytest.mark.parametrize("asked", [False, True], ids=["tensor", "function"])
def test_integer_masks_of_pairs_equal_bool_ones(attend: Attend, shape: tuple[int, ...], asked: bool) -> None:
    tensors, mask = draw(), draw_mask(*shape)

    def give(x: Tensor) -> Any:
        whole = x.expand(B, H, N, N)
        return (lambda rows, cols: whole[..., rows, cols]) if asked else x

    torch.testing.assert_close(
        attend(*tensors, mask=give(mask.long())), ops.exact_attention(*tensors, mask=mask.expand(B, H, N, N))
    )


@every_softmax
@pytest.mark.parametrize(
    ("option", "wanted"), [("mask", "mask must be bool or integer"), ("bias", r"bias must be real numbers")]
)
@pytest.mark.parametrize("shape", [(N, N + 1), (H + 1, N, N), (B + 1, 1, N, N), (1, B, H, N, N), (2, N)])
@pytest.mark.parametrize("asked", [False, True], ids=["tensor", "function"])
def test_masks_and_biases_that_do_not_broadcast_are_refused(
    attend: Attend, option: str, wanted: str, shape: tuple[int, ...], asked: bool
) -> None:
    given = torch.ones(shape) if option == "bias" else torch.ones(shape) > 0
    with pytest.raises(ValueError, match=rf"^{wanted}.*, of a shape that broadcasts to \(2, 4, \d, \d\); got "):
        attend(*draw(), **{option: (lambda rows, cols: given) if asked else given})


@every_softmax
def test_a_float_mask_of_pairs_and_a_bool_bias_are_refused(attend: Attend) -> None:
    with pytest.raises(ValueError, match=r"^mask must be bool or integer.* got float32"):
        attend(*draw(), mask=torch.zeros(N, N))
    with pytest.raises(ValueError, match=r"^bias must be real numbers \(a bool is for mask=\).* got bool"):
        attend(*draw(), bias=torch.ones(N, N) > 0)


def test_a_bias_may_be_of_integers() -> None:
    assert check_bias(torch.ones(3, 4).long(), (2, 3, 4)).shape == (3, 4)


def test_leading_dimensions_are_the_masks_own_too() -> None:
    q, k, v = (torch.randn(3, 2, heads, N, D) for heads in (H, G, G))
    mask = draw_mask(3, 2, N)
    for attend in [*SOFTMAX.values(), partial(ops.local_attention, window=N)]:
        found, wanted = attend(q, k, v, key_mask=mask.int()), ops.exact_attention(q, k, v, key_mask=mask)
        torch.testing.assert_close(found, wanted)
        with pytest.raises(ValueError, match=r"key_mask must be .* of shape \(3, 2, 6\); got int32 of shape \(2, 6\)"):
            attend(q, k, v, key_mask=mask[0].int())


def test_a_state_of_another_batch_is_refused() -> None:
    (q, k, v), state = draw(), ops.empty_state(B + 1, G, D, E, device=torch.device("cpu"), dtype=torch.float64)
    calls: list[Callable[[], Any]] = [
        lambda: ops.causal_linear_attention(q, k, v, state, query_map=MAP, key_map=MAP),
        lambda: ops.absorb_keys(k, v, state, key_map=MAP),
        lambda: ops.read_state(q, state, query_map=MAP),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="the state holds a batch of 3, got a batch of 2"):
            call()
