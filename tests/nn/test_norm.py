import math

import pytest
import torch
from torch import nn

from performer_lm.nn.norm import LayerNorm, NoNorm, QueryKeyNorm, RMSNorm, ScaleNorm


@pytest.mark.parametrize(("ours", "torchs"), [(RMSNorm, nn.RMSNorm), (LayerNorm, nn.LayerNorm)])
def test_equals_torch(ours: type[nn.Module], torchs: type[nn.Module]) -> None:
    norm = ours(8).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x), torchs(8, eps=norm.eps).double()(x))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm, ScaleNorm])
def test_statistics_of_half_precision_inputs_are_float32(norm: type[nn.Module]) -> None:
    x = (300 * torch.randn(2, 8)).half()  # squares overflow in float16
    out = norm(8)(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), norm(8)(x.float()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm, ScaleNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_taken(norm: type[nn.Module], dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, dtype=dtype)
    torch.testing.assert_close(norm(8).to(dtype)(x), norm(8)(x))


def test_scale_norm_starts_at_the_length_of_unit_entries() -> None:
    out = ScaleNorm(16)(7 * torch.randn(5, 16))
    torch.testing.assert_close(out.norm(dim=-1), torch.full((5,), 4.0))
    assert bool(ScaleNorm(16)(torch.zeros(2, 16)).isfinite().all())


def test_no_norm_is_nothing() -> None:
    x = torch.randn(3, 8)
    assert NoNorm(8)(x) is x
    assert list(NoNorm(8).parameters()) == []


def test_logits_are_a_bounded_temperature_times_the_cosine() -> None:
    norm = QueryKeyNorm(key_heads=2, dim_head=9, bound=6.0)
    with torch.no_grad():
        norm.logit.copy_(torch.tensor([0.0, 1.0]))
    q, k = 30 * torch.randn(1, 4, 5, 9), torch.randn(1, 2, 7, 9)
    logits = norm(q) @ norm(k).repeat_interleave(2, dim=1).mT / math.sqrt(9)
    cosine = nn.functional.cosine_similarity(q[:, :, :, None], k.repeat_interleave(2, dim=1)[:, :, None], dim=-1)
    temperature = 6.0 * torch.tensor([0.0, 0.0, 1.0, 1.0]).sigmoid()
    torch.testing.assert_close(logits, temperature[:, None, None] * cosine)
    assert bool((norm(torch.zeros(1, 2, 3, 9)) == 0).all())


def test_a_bound_must_be_positive() -> None:
    with pytest.raises(ValueError, match="bound must be above 0, got 0"):
        QueryKeyNorm(key_heads=1, dim_head=2, bound=0.0)
