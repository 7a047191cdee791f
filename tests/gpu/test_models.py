"""A model on a CUDA device gives the losses, gradients and tokens of float64 on a CPU."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from performer_lm.attention.base import fork
from performer_lm.attention.chunked import ChunkedAttention
from performer_lm.attention.flash import FlashAttention
from performer_lm.generation.captured import PATIENCE, Steps
from performer_lm.model import PerformerLM
from performer_lm.objectives import NextToken

pytestmark = pytest.mark.gpu

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ["model.dim=128", "model.dim_head=32", "data.context=600"]
BACKENDS = [f"attn={path.stem}" for path in sorted((CONFIGS / "attn").glob("*.yaml"))]
OTHERS = [
    *(f"attn=favor attn/features={name}" for name in ("hyperbolic", "learned", "optimal", "taylor2")),
    *("attn=favor model.key_heads=2", "attn=flash model.key_heads=2", "attn=favor model.reversible=true"),
    *("model=transformer attn=flash", "model=performer_classic"),
]
of_every_kind = pytest.mark.parametrize("overrides", [*BACKENDS, *OTHERS])
Pair = Callable[[str], tuple[PerformerLM, PerformerLM]]


@pytest.fixture
def pair(lively_model: Callable[..., PerformerLM], device: torch.device) -> Pair:
    """Return a function from overrides to a model in float64 on the CPU, and the same in float32 on the device."""

    def build(overrides: str) -> tuple[PerformerLM, PerformerLM]:
        model = lively_model(*SIZES, *overrides.split())
        return model, copy.deepcopy(model).float().to(device)

    return build


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over that of what is wanted."""
    found, wanted = found.detach().cpu().double(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm())


def losses(model: PerformerLM, windows: Tensor) -> Tensor:
    return NextToken(chunk_size=None)(model, windows.to(model.head.weight.device), step=0).nats


@of_every_kind
def test_losses_and_gradients_are_those_of_float64_on_a_cpu(pair: Pair, overrides: str) -> None:
    exact, model = pair(overrides)
    windows = torch.randint(0, 40, (2, 601))
    wanted, found = losses(exact, windows), losses(model, windows)
    assert error(found, wanted) < 1e-5
    for nats in (wanted, found):
        nats.mean().backward()
    pairs = [(one.grad, other.grad) for one, other in zip(model.parameters(), exact.parameters(), strict=True)]
    gradients = [
        torch.cat([x.cpu().double().flatten() for x in each if x is not None]) for each in zip(*pairs, strict=True)
    ]
    assert error(*gradients) < 1e-4


@of_every_kind
def test_losses_in_bfloat16_are_within_a_few_of_its_roundings(pair: Pair, overrides: str, device: torch.device) -> None:
    exact, model = pair(overrides)
    windows = torch.randint(0, 40, (2, 601))
    wanted = losses(exact, windows)
    with torch.autocast(device.type, torch.bfloat16):
        found = losses(model, windows)
    found.mean().backward()
    assert error(found, wanted) < 8 * 2**-8  # it keeps 8 bits
    assert all(bool(x.grad.isfinite().all()) for x in model.parameters() if x.grad is not None)


@of_every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_steps_are_the_forward(pair: Pair, overrides: str, dtype: torch.dtype, device: torch.device) -> None:
    exact, model = pair(overrides)
    tokens = torch.randint(0, 40, (2, 300))
    parts = tokens.to(device).split([290, *[1] * 10], dim=1)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        wanted, state, found = exact(tokens), model.init_state(2), []
        for part in parts:
            logits, state = model.extend(part, state)
            found.append(logits)
    assert error(torch.cat(found, dim=1), wanted) < (1e-5 if dtype == torch.float32 else 16 * 2**-8)


@of_every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_are_the_models_own_and_do_not_wait(
    pair: Pair, overrides: str, dtype: torch.dtype, device: torch.device
) -> None:
    """A capture that fails or differs says so, which is an error here."""
    model = pair(overrides)[1].to(dtype)
    tokens = torch.randint(0, 40, (2, 300), device=device)
    with torch.inference_mode():
        _, state = model.start(tokens[:, :250])
        steps, own = Steps(model), fork(state)
        for place, ids in enumerate(tokens[:, 250:].unbind(1)):
            wanted, own = model.extend(ids[:, None], own)
            if device.type == "cuda" and place > PATIENCE:
                torch.cuda.set_sync_debug_mode("error")
            try:
                found, state = steps.extend(ids, state)
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            assert error(found, wanted[:, -1]) < (1e-5 if dtype == torch.float32 else 8 * 2**-8)
    grows = any(name in overrides for name in ("exact", "chunked", "flash", "hybrid"))  # the last has a layer of flash
    assert steps.is_captured == (not grows and device.type == "cuda")


def test_flash_in_float32_keeps_its_decay_over_16k_tokens(device: torch.device) -> None:
    shape = {"heads": 2, "key_heads": 2, "dim_head": 64, "dim_value": 64, "layer": 0}
    chunked = ChunkedAttention(**shape, query_chunk_size=1024, key_chunk_size=1024)
    inputs = [*torch.randn(3, 1, 2, 16384, 64), -0.1 * torch.rand(1, 2, 16384)]
    results = []
    for attention, dtype in ((FlashAttention(**shape), torch.float32), (chunked, torch.float64)):
        *tokens, log_decay = (x.to(device, dtype, copy=True).requires_grad_() for x in inputs)
        out = attention(*tokens, causal=True, log_decay=log_decay)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*tokens, log_decay])])
    errors = [error(one, other.cpu()) for one, other in zip(*results, strict=True)]
    assert max(errors) < 1e-3, errors  # the sum of the decay has steps of 1e-4 there; in TF32, of 0.5
