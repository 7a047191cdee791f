"""Which precision a run computes in, where it is left open."""

import torch


def choose_precision(precision: str, *, accelerator: str) -> str:
    """Return a precision of Lightning: `auto` is bf16-mixed where the device multiplies bfloat16, else 32-true.

    Weights, optimizer, statistics and the sums of linear attention stay in float32 either way.

    Args:
        precision: of Lightning, or `auto`.
        accelerator: of Lightning; `auto` takes what there is.
    """
    if precision != "auto":
        return precision
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = "cpu" if accelerator == "cpu" or (accelerator == "auto" and found is None) else "accelerator"
    return "bf16-mixed" if multiplies_bfloat16(kind) else "32-true"


def multiplies_bfloat16(kind: str) -> bool:
    """Tell whether the CPU (`kind` cpu) or the accelerator has instructions for products of bfloat16.

    Others emulate them, which costs more than it gains.
    """
    if kind == "cpu":
        return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
