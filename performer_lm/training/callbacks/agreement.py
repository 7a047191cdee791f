"""Agreements between the ranks of a run, for which no host waits on its device in every step."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class Agreement:
    """Whether any rank wants something; all ranks learn it in the same step.

    One process knows at once, and so do ranks on CPUs. On accelerators the answer is on its way while a step runs: it
    is known when the ranks ask again, before the next step.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, torch.Event | None] | None = None

    def reach(self, trainer: Trainer, *, wanted: bool) -> bool:
        """Ask all ranks before a step, and return True if one of them wants it, on all in the same step."""
        if trainer.world_size == 1:
            return wanted
        if self._answer():
            return True
        wish = torch.full((), float(wanted), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(wish, op=torch.distributed.ReduceOp.MAX)
        self._asked = send_to_host(wish)
        return self._asked[1] is None and self._answer()

    def forget(self) -> None:
        """Drop what was asked, on all ranks in the same step."""
        self._asked = None

    def _answer(self) -> bool:
        asked, self._asked = self._asked, None
        if asked is None:
            return False
        answer, arrived = asked
        if arrived is not None:
            arrived.synchronize()
        return bool(answer)


def send_to_host(values: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Copy numbers to the host, and return them with the event of their arrival; None where they are there already."""
    if values.device.type == "cpu":
        return values, None
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.Event(values.device)
    arrived.record()
    return host, arrived
