"""In bfloat16 the engine errs by no more than softmax's own kernel, since all that it multiplies is float32."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from performer_lm.ops.linear import causal_linear_attention, empty_state
from performer_lm.ops.maps import Exponential
from performer_lm.ops.projections import draw_projection

H, N, D, M = 2, 96, 64, 128


def favor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide, scale = torch.promote_types(q.dtype, torch.float32), D**-0.25
    weight = draw_projection(H, M, D, seed=0).to(wide)
    state = empty_state(1, H, M, D, device=q.device, dtype=wide)
    key_map = Exponential((weight,), scale=scale, norm=0.5 * scale * scale)
    return causal_linear_attention(q, k, v, state, query_map=Exponential((weight,), scale=scale), key_map=key_map)[0]


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def test_bfloat16_errs_by_no_more_than_softmax_does() -> None:
    *inputs, grad = (torch.randn(1, H, N, D).bfloat16() for _ in range(4))
    errors = []
    for attend in (favor, softmax):
        found: list[Tensor] = []
        wanted: list[Tensor] = []
        for results, dtype in ((found, torch.bfloat16), (wanted, torch.float64)):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
            out = attend(*leaves)
            results += [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]
        errors.append([float((x.double() - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True)])
    ours, theirs = errors
    assert all(one <= other for one, other in zip(ours, theirs, strict=True)), errors
