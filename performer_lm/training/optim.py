"""Optimizers, and how the parameters of a model are grouped for them."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Final, overload

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from performer_lm.ops.precision import multiplies_bfloat16
from performer_lm.ranges import NotNegative, Share, ranged

Group = dict[str, Any]
DECAYS: Final = "decays"  # whether weight decay acts on a group
MATRICES: Final = "matrices"  # whether a group is the hidden layers' matrices, which Muon can orthogonalise


def parameter_groups(model: nn.Module, *, head: nn.Module) -> list[Group]:
    """Split the trainable parameters in three: hidden layers' matrices, the output layer's matrix, and the rest.

    The rest (norms, biases, convolutions, embeddings, learned features) does not decay. A parameter used twice stands
    once, and in the rest if any of its uses does: a tied embedding does not decay. `head` is the output layer.
    """
    matrices: list[nn.Parameter] = []
    outputs: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    in_rest = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not (isinstance(module, nn.Linear) and name == "weight")
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_output = any(parameter is own for own in head.parameters())
            (rest if id(parameter) in in_rest else outputs if is_output else matrices).append(parameter)
    groups = [
        {"params": matrices, DECAYS: True, MATRICES: True},
        {"params": outputs, DECAYS: True, MATRICES: False},
        {"params": rest, DECAYS: False, MATRICES: False},
    ]
    return [group for group in groups if group["params"]]


@ranged
def adamw(
    groups: Iterable[Group],
    *,
    lr: NotNegative,
    betas: tuple[Share, Share],
    eps: NotNegative,
    weight_decay: NotNegative,
    fused: bool,
) -> AdamW:
    """Build AdamW (arXiv 1711.05101) over `parameter_groups`.

    Args:
        groups: parameter groups.
        lr: peak learning rate.
        betas: decay of the two running averages.
        eps: added to the root of the second average.
        weight_decay: of the groups that decay.
        fused: update in one pass over memory; not for `16-mixed`, whose scaler it does not suit.
    """
    decayed = [{**group, "weight_decay": weight_decay if group[DECAYS] else 0.0} for group in groups]
    return AdamW(decayed, lr=lr, betas=betas, eps=eps, fused=fused)


@ranged
def muon(
    groups: Iterable[Group],
    *,
    lr: NotNegative,
    matrix_lr: NotNegative,
    momentum: Share,
    betas: tuple[Share, Share],
    eps: NotNegative,
    weight_decay: NotNegative,
    fused: bool,
) -> Optimizer:
    """Build Muon (Jordan et al. 2024) for the hidden layers' matrices, beside `adamw` for all else.

    Args:
        groups: parameter groups.
        lr, betas, eps, fused: of `adamw`.
        matrix_lr: peak learning rate of Muon.
        momentum: of Muon.
        weight_decay: of the groups that decay, under both.
    """
    groups = list(groups)
    rest = adamw(
        [group for group in groups if not group[MATRICES]] or [{"params": [torch.zeros(0)], DECAYS: False}],
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        fused=fused,
    )
    matrices = [group for group in groups if group[MATRICES]]
    if not matrices:
        return rest
    return Together(HostMuon(matrices, lr=matrix_lr, momentum=momentum, weight_decay=weight_decay), rest)


class HostMuon(Muon):
    """Muon with float32 products on CPUs that emulate bfloat16, where torch's take several times as long.

    Elsewhere it is `torch.optim.Muon`. The state is the same.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch has two
        """Take a step."""
        on_host = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        if not on_host or multiplies_bfloat16("cpu"):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                grad, state = parameter.grad, self.state[parameter]
                if grad is None:
                    continue
                average = state.setdefault("momentum_buffer", torch.zeros_like(grad)).lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(average, group["momentum"]) if group["nesterov"] else average
                rows, columns = parameter.shape
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalize(update, group), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
        return loss


def orthogonalize(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Bring the singular values of a matrix near 1 by the quintic Newton-Schulz iteration of a group of Muon's."""
    a, b, c = group["ns_coefficients"]
    turned = x.shape[0] > x.shape[1]
    found = x.mT if turned else x
    found = found / found.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if turned else found


def check_scaling(optimizer: Optimizer, *, precision: str) -> None:
    """Raise ValueError for fused AdamW with float16: it takes loss scales off gradients only after their clipping."""
    if precision == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            "optimizer.fused=true does not go with trainer.precision=16-mixed: set it false, or use bf16-mixed"
        )


class Together(Optimizer):
    """Several optimizers, each over parameters of its own, stepped as one."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__(
            [{"params": [p for part in parts for group in part.param_groups for p in group["params"]]}], {}
        )
        self._share_groups()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Evaluate the closure once, then step every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        """Hold the parts' own groups, so that a schedule that sets a rate here sets it there."""
        self.param_groups = list(chain.from_iterable(part.param_groups for part in self.parts))
