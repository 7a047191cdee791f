"""Optimizers, and which parameters decay."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW


def adamw(
    groups: Iterable[dict[str, Any]], *, lr: float, betas: list[float], eps: float, weight_decay: float, fused: bool
) -> AdamW:
    """Build AdamW (arXiv 1711.05101) over `decay_groups`.

    Args:
        groups: parameter groups.
        lr: peak learning rate.
        betas: decay of the two running averages.
        eps: added to the root of the second average.
        weight_decay: of the decaying group alone.
        fused: update in one pass over memory; not for `16-mixed`, whose scaler it does not suit.

    Raises:
        ValueError: for betas outside [0, 1).
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas must be two numbers within [0, 1), got {betas}")
    decayed = [{**group, "weight_decay": weight_decay if group["decays"] else 0.0} for group in groups]
    return AdamW(decayed, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters in two: matrices of layers decay; norms, biases, convolutions, embeddings do not.

    Returns:
        Two groups `{"params": [...], "decays": bool}`; shared parameters stand once, and not decayed if any use is
        an embedding.
    """
    kept: list[Tensor] = []
    decayed: list[Tensor] = []
    kept_alone = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not (isinstance(module, nn.Linear) and name == "weight")
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            (kept if id(parameter) in kept_alone else decayed).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": kept, "decays": False}]
