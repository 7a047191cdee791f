"""Where a CPU multiplies bfloat16, products of weights take it: errors stay within SDPA's, all else is float32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from performer_lm.ops.linear import LinearState, causal_linear_attention, empty_state, sequence
from performer_lm.ops.maps import Exponential
from performer_lm.ops.projections import draw_projection

B, H, D, M = 1, 2, 64, 128


def maps(dtype: torch.dtype) -> tuple[Exponential, Exponential]:
    weight, scale = draw_projection(H, M, D, seed=0).to(dtype), D**-0.25
    return Exponential((weight,), scale=scale), Exponential((weight,), scale=scale, norm=0.5 * scale * scale)


def draw(n: int, std: float) -> list[Tensor]:
    """Draw q, k, v and a gradient at the output that bfloat16 holds."""
    return [(size * torch.randn(B, H, n, D)).bfloat16() for size in (std, std, 1.0, 1.0)]


def favor(tensors: list[Tensor], dtype: torch.dtype, **chosen: Any) -> tuple[list[Tensor], LinearState]:
    """Return the output, its gradients at q, k, v and the decay, and the state."""
    q, k, v, grad = (x.to(dtype) for x in tensors)
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if "log_decay" in chosen:
        chosen["log_decay"] = chosen["log_decay"].to(wide).requires_grad_()
        leaves.append(chosen["log_decay"])
    query_map, key_map = maps(wide)
    start = empty_state(B, H, M, D, device=q.device, dtype=wide)
    out, state = causal_linear_attention(q, k, v, start, query_map=query_map, key_map=key_map, **chosen)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)], state


def softmax(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    *leaves, grad = (x.to(dtype) for x in tensors)
    out = scaled_dot_product_attention(*(x.requires_grad_() for x in leaves), is_causal=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Return the size of each difference over that of what is wanted."""
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True)]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "multiplies_bfloat16", lambda kind: True)
