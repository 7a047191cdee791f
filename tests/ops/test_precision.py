import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from performer_lm.ops import precision
from performer_lm.ops.precision import BLOCK, no_autocast, running_sum


class RefuseCumsum(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.cumsum.default or not args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [0, 1, 5, BLOCK, BLOCK + 1, 3 * BLOCK, BLOCK**2 + 3])
def test_sums_by_products_are_running_sums_with_their_gradient(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, length, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, length, dtype=torch.float64)

    def both() -> tuple[Tensor, Tensor]:
        out = running_sum(x)
        return out, torch.autograd.grad((out * weights).sum(), x)[0]

    wanted = both()
    monkeypatch.setattr(precision, "VARIES", {"cpu"})
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with RefuseCumsum():
        found = both()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-12)


def test_precision_changes_where_a_context_is_entered_not_where_it_is_made() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        context = no_autocast(torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "high"
        with context:
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
