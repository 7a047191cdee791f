"""Learning-rate schedules: the rate at each optimizer step, as a share of its peak.

Each takes the length of the run and returns the function of the step that `LambdaLR` wants: a function of the step
alone, so that a resumed run goes on with it. All begin with a warm-up, over which the rate rises linearly from 0 to its
peak. Lengths are given as a share of the run (a float) or as a number of steps (an int).
"""

import math
from collections.abc import Callable

from performer_lm.ranges import Fraction, Whole, ranged

Schedule = Callable[[int], float]
Length = Whole | Fraction


@ranged
def constant(steps: int, *, warmup: Length) -> Schedule:
    """Stay at the peak."""
    return _after_warmup(_count("warmup", warmup, steps), lambda step: 1.0)


@ranged
def linear(steps: int, *, warmup: Length, final: Fraction) -> Schedule:
    """Fall along a line to `final`, the share of the peak that the last step ends at."""
    rise = _count("warmup", warmup, steps)
    return _after_warmup(rise, lambda step: final + (1 - final) * (1 - _progress(step, rise, steps)))


@ranged
def cosine(steps: int, *, warmup: Length, final: Fraction) -> Schedule:
    """Fall along half a cosine to `final` (arXiv 1608.03983, without restarts)."""
    rise = _count("warmup", warmup, steps)

    def fall(step: int) -> float:
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * _progress(step, rise, steps)))

    return _after_warmup(rise, fall)


@ranged
def warmup_stable_decay(steps: int, *, warmup: Length, decay: Length, final: Fraction) -> Schedule:
    """Stay at the peak, then fall over the last `decay` steps to `final`, as 1 - sqrt (arXiv 2404.06395, 2405.18392).

    Until the fall begins, the rate does not depend on the length of the run: a run stopped there can be made longer.
    """
    rise, fall = _count("warmup", warmup, steps), _count("decay", decay, steps)
    if rise + fall > steps:
        raise ValueError(
            f"schedule.warmup ({rise} steps) and schedule.decay ({fall}) are longer than the run ({steps})"
        )
    return _after_warmup(rise, lambda step: final + (1 - final) * (1 - math.sqrt(_progress(step, steps - fall, steps))))


@ranged
def inverse_sqrt(steps: int, *, warmup: Length) -> Schedule:
    """Fall as the inverse root of the step, whatever the length of the run (arXiv 1706.03762)."""
    rise = max(1, _count("warmup", warmup, steps))
    return _after_warmup(rise, lambda step: math.sqrt(rise / (step + 1)))


def _after_warmup(rise: int, share: Schedule) -> Schedule:
    return lambda step: (step + 1) / rise if step < rise else share(step)


def _progress(step: int, first: int, last: int) -> float:
    """Return how far `step` has come from `first` to `last`, within 0..1."""
    return min(1.0, max(0, step - first) / max(1, last - first))


def _count(name: str, length: Length, steps: int) -> int:
    """Return a length in steps."""
    if isinstance(length, int):
        if length > steps:
            raise ValueError(f"schedule.{name} ({length} steps) must be within 0..{steps}, the length of the run")
        return length
    return round(steps * length)
