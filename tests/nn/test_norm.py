import pytest
import torch
from torch import nn

from performer_lm.nn.norm import LayerNorm, RMSNorm


@pytest.mark.parametrize(("ours", "torchs"), [(RMSNorm, nn.RMSNorm), (LayerNorm, nn.LayerNorm)])
def test_equals_torch(ours: type[nn.Module], torchs: type[nn.Module]) -> None:
    norm = ours(8).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x), torchs(8, eps=norm.eps).double()(x))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_statistics_of_half_precision_inputs_are_float32(norm: type[nn.Module]) -> None:
    x = (300 * torch.randn(2, 8)).half()  # squares overflow in float16
    out = norm(8)(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), norm(8)(x.float()), atol=1e-3, rtol=1e-3)
