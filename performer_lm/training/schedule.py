"""Learning-rate schedules: the rate at each optimizer step, as a share of its peak.

Each takes the length of the run and returns the function of the step that `LambdaLR` wants.
"""

import math
from collections.abc import Callable


def warmup_cosine(steps: int, *, warmup: float, final: float) -> Callable[[int], float]:
    """Rise linearly over the first `warmup` share of the run, then fall along half a cosine to `final`."""
    rise = _warmup_steps(steps, warmup)
    if not 0 <= final <= 1:
        raise ValueError(f"schedule.final is a share of the peak rate, within 0..1; got {final}")

    def share(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        along = min(1.0, (step - rise) / max(1, steps - rise))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))

    return share


def warmup_constant(steps: int, *, warmup: float) -> Callable[[int], float]:
    """Rise linearly over the first `warmup` share of the run, then stay."""
    rise = _warmup_steps(steps, warmup)
    return lambda step: min(1.0, (step + 1) / rise) if rise else 1.0


def _warmup_steps(steps: int, warmup: float) -> int:
    if not 0 <= warmup <= 1:
        raise ValueError(f"schedule.warmup is a share of the run, within 0..1; got {warmup}")
    return round(steps * warmup)
