"""FAVOR attention keeps the contract and stays the same function through redraws, devices and precisions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from performer_lm.attention import favor as favor_module
from performer_lm.attention.base import fork
from performer_lm.attention.favor import FavorAttention, favor
from performer_lm.attention.feature_maps import SoftmaxFeatures
from performer_lm.ops.projections import draw_projection


def build(**options: Any) -> FavorAttention:
    shape = {"heads": 4, "key_heads": 2, "dim_head": 8, "dim_value": 6, "layer": 1, "num_features": 16, "seed": 0}
    rest = {"redraw_interval": None, "redraw_until": None, "chunk_size": 8, "features": positive()}
    return FavorAttention(**(shape | rest | options))


def positive(**options: Any) -> partial[SoftmaxFeatures]:
    chosen = {"antithetic": False, "learned": False, "centred": False, "momentum": None}
    return partial(SoftmaxFeatures, coupling="orthogonal", regularized=False, **(chosen | options))


def test_the_factory_of_plain_favor_is_that_of_the_config(model_section: Callable[..., dict[str, Any]]) -> None:
    def options(section: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in section.items() if key not in ("_target_", "_partial_")}

    section = model_section("attn=favor", "seed=3")["attn"]
    factory = favor(num_features=section["num_features"], seed=3)
    features = factory.keywords["features"]
    assert options(section) == factory.keywords | {"features": section["features"]}
    assert options(section["features"]) == features.keywords
    named = [f"{kind.__module__}.{kind.__qualname__}" for kind in (factory.func, features.func)]
    assert named == [section["_target_"], section["features"]["_target_"]]


def inputs(n: int, std: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return std * torch.randn(2, 4, n, 8), std * torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 6)


def quadratic(attention: FavorAttention, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Write FAVOR+ out in float64, the n x m features of every pair and all."""
    x = q.double() * 8**-0.25
    y, v = (t.double().repeat_interleave(2, dim=1) for t in (k * 8**-0.25, v))
    w = attention.features.projection.double().repeat_interleave(2, dim=0)
    logits = ((x[..., :, None, :] + y[..., None, :, :]) @ w.mT[:, None]).logsumexp(dim=-1)
    logits = logits - 0.5 * y.square().sum(dim=-1)[..., None, :]
    if causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:]).bool().tril(), -torch.inf)
    return logits.softmax(dim=-1) @ v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 7, 8, 21])
def test_equals_favor_written_out(n: int, causal: bool) -> None:
    attention, tensors = build(), inputs(n)
    expected = quadratic(attention, *tensors, causal=causal)
    assert (attention(*tensors, causal=causal) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("split", [1, 7, 8, 20])
def test_decoding_equals_training(split: int) -> None:
    attention, (q, k, v) = build(), inputs(21)
    log_decay, mask = -torch.rand(2, 2, 21), torch.rand(2, 21) > 0.2
    whole = attention(q, k, v, causal=True, log_decay=log_decay, mask=mask)
    state = attention.init_state(2, max_len=0, device=q.device, dtype=q.dtype)
    outputs = []
    for part in (slice(0, split), *(slice(i, i + 1) for i in range(split, 21))):
        out, state = attention.extend(
            q[:, :, part], k[:, :, part], v[:, :, part], state, mask=mask[:, part], log_decay=log_decay[..., part]
        )
        outputs.append(out)
    assert (torch.cat(outputs, dim=-2) - whole).abs().max() < 2e-6


def test_a_forked_state_is_untouched() -> None:
    attention, (q, k, v) = build(), inputs(5)
    _, state = attention.extend(q, k, v, attention.init_state(2, max_len=9, device=q.device, dtype=q.dtype))
    kept = fork(state)
    first, _ = attention.extend(q, k, v, fork(state))
    again, _ = attention.extend(q, k, v, kept)
    assert torch.equal(first, again)


def test_redraws_are_a_function_of_the_step() -> None:
    attention = build(redraw_interval=10, layer=3)
    for step, index in ((0, 0), (9, 0), (10, 1), (39, 3), (5, 0)):
        attention.redraw(step)
        expected = draw_projection(2, 16, 8, seed=0, layer=3, index=index)
        assert torch.equal(attention.features.projection, expected)


def test_null_never_redraws_and_checkpoints_hold_the_projection() -> None:
    attention = build()
    attention.redraw(10**6)
    other = build(seed=5)
    assert not torch.equal(other.features.projection, attention.features.projection)
    other.load_state_dict(attention.state_dict())
    tensors = inputs(5)
    assert torch.equal(other(*tensors, causal=True), attention(*tensors, causal=True))


def test_redraws_stop_at_the_last_step() -> None:
    attention, other = build(redraw_interval=10, redraw_until=25), build(redraw_interval=10)
    attention.redraw(1000)
    other.redraw(25)
    assert torch.equal(attention.features.projection, other.features.projection)


def test_a_resumed_run_redraws_as_if_never_stopped() -> None:
    whole, stopped = build(redraw_interval=3), build(redraw_interval=3)
    for step in range(8):
        for _ in range(4):  # micro-batches may each ask
            whole.redraw(step)
    stopped.redraw(5)
    resumed = build(redraw_interval=3)
    resumed.load_state_dict(stopped.state_dict())
    for step in (6, 7):
        resumed.redraw(step)
    assert torch.equal(resumed.features.projection, whole.features.projection)
    assert torch.equal(resumed.features.get_extra_state(), whole.features.get_extra_state())


def test_fixed_projections_stay_fixed_after_loading() -> None:
    attention = build(redraw_interval=1)
    attention.redraw(4)
    attention.features.fixed = True
    loaded = build(redraw_interval=1)
    loaded.load_state_dict(attention.state_dict())
    for step in (5, 6):
        loaded.redraw(step)
    assert torch.equal(loaded.features.projection, attention.features.projection)


def _gather_projection(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    attention = build(redraw_interval=2)
    attention.redraw(7)
    found = [torch.empty_like(attention.features.projection) for _ in range(2)]
    torch.distributed.all_gather(found, attention.features.projection)
    torch.distributed.destroy_process_group()
    assert torch.equal(*found)


@pytest.mark.slow
def test_processes_draw_the_same(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_gather_projection, (str(tmp_path / "store"),), nprocs=2)


def test_null_features_are_d_ln_d() -> None:
    assert build(num_features=None).features.num_features == 16  # 8 ln 8 = 16.6


def test_runs_on_meta_from_birth() -> None:
    with torch.device("meta"):
        attention = build()
        out = attention(*inputs(19), causal=True)
    attention.redraw(0)
    assert out.shape == (2, 4, 19, 6)
    assert attention.features.projection.is_meta


@pytest.mark.parametrize("std", [1.0, 3.0, 10.0])
def test_finite_and_near_float64_at_any_loudness(std: float) -> None:
    attention, (q, k, v) = build(), inputs(40, std)
    k[:, :, 13] *= 0.01  # in log features a short key among long ones is the loud one
    k[:, :, 22] *= 10.0
    out = attention(q, k, v, causal=True)
    assert (out - quadratic(attention, q, k, v, causal=True)).abs().max() < 2e-5


def test_what_it_cannot_do_is_said() -> None:
    attention, (q, k, v) = build(), inputs(5)
    with pytest.raises(ValueError, match="log_decay needs causal"):
        attention(q, k, v, causal=False, log_decay=torch.zeros(2, 2, 5))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        build(chunk_size=0)
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        build(num_features=0)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"features": positive(learned=True)}, "needs features that are not trained"),
        ({"dim_head": 256}, "needs heads of width 128 at most, got 256"),
    ],
)
def test_kernels_are_refused_when_a_model_is_built(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=f"kernel=triton {wanted}: take kernel=auto"):
        build(kernel="triton", **options)


def test_a_run_refuses_kernels_that_its_device_has_not(
    invoke: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(favor_module, "runs_on", lambda device: False)  # as without an interpreter
    code, out, err = invoke("debug=fast", "attn=favor", "attn.kernel=triton", "run_dir=run")
    assert (code, out) == (2, "")
    assert err.startswith("error: kernel=triton needs a CUDA device, got cpu")
    assert err.count("\n") == 1
    assert not Path("run").exists()


def test_a_model_of_kernels_opens_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(favor_module, "runs_on", lambda device: False)
    q, k, v = inputs(9)
    expected = build()(q, k, v, causal=True)
    assert torch.equal(build(kernel="triton")(q, k, v, causal=True), expected)
