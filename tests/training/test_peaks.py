import pytest
import torch
from lightning.fabric.utilities.throughput import _CUDA_FLOPS

from performer_lm.training.peaks import PEAKS, named_peak, peak_flops


def test_peaks_are_dense() -> None:
    for name in ("H100 PCIe", "A100", "L4"):  # where Lightning's table is dense as well
        lightning = next(peaks for known, peaks in _CUDA_FLOPS.items() if known == name.lower())
        assert PEAKS[name][0] == pytest.approx(lightning[torch.bfloat16] / 1e12, rel=0.01)
    assert PEAKS["H200"] == PEAKS["H100"]  # one chip, more memory; Lightning 2.6.6 counts sparse matrices for one
    assert all(half >= 1.9 * single for half, single, _ in PEAKS.values())


@pytest.mark.parametrize(
    ("name", "half", "tensor_float", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, False, 989.4e12),
        ("NVIDIA H100 PCIe", True, False, 756e12),
        ("NVIDIA H200", False, True, 494.7e12),
        ("NVIDIA A100-SXM4-80GB", False, False, 19.5e12),
        ("NVIDIA L40S", True, False, 362e12),
        ("NVIDIA L4", True, False, 121e12),
        ("AMD Instinct MI300X", True, False, None),
    ],
)
def test_devices_are_known_by_name(name: str, half: bool, tensor_float: bool, peak: float | None) -> None:
    assert named_peak(name, half=half, tensor_float=tensor_float) == peak
    assert peak_flops(torch.device("cpu"), precision="32-true") is None
