"""How many floating-point operations a second a device can do, of which a run's utilisation is a share.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the arithmetic that a model's forward and backward need,
three times `LanguageModel.count_flops`, over what the device could have done in that time. What is computed twice to
save memory does not count, so utilisation falls where it is.
"""

from typing import Final

import torch

# What NVIDIA's data sheets give for dense matrices (they print twice as much, for sparse ones), in 10^12 operations a
# second: bfloat16 or float16 with float32 sums, tensor float 32, float32. By the device's name; the first match counts.
PEAKS: Final[dict[str, tuple[float, float, float]]] = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.5, 30.3),
    "A10G": (70.0, 35.0, 35.0),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
}


def peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Return the dense peak of a device in operations per second; None where the table does not know it.

    Products of float32 count as tensor float 32 where torch is set to use that.
    """
    if device.type != "cuda":
        return None
    return named_peak(
        torch.cuda.get_device_name(device),
        half="16" in precision,
        tensor_float=torch.get_float32_matmul_precision() != "highest",
    )


def named_peak(name: str, *, half: bool, tensor_float: bool) -> float | None:
    """Return the dense peak of the device that reports `name`, in operations per second."""
    for known, (of_half, of_tensor_float, of_float) in PEAKS.items():
        if known.lower() in name.lower():
            return 1e12 * (of_half if half else of_tensor_float if tensor_float else of_float)
    return None
