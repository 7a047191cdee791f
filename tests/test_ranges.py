import inspect
import math
import re
from dataclasses import dataclass
from typing import Annotated

import pytest
from annotated_types import Ge, Gt, Le, Lt

from performer_lm.ranges import Count, Positive, Share, ranged, refusal

Length = Annotated[int, Ge(0)] | Annotated[float, Ge(0), Le(1)]


@ranged
def call(
    steps: Count,
    *,
    warmup: Length = 0.1,
    sizes: list[Count] | None = None,
    pair: tuple[Share, Share] = (0.0, 0.5),
    rate: Positive | None = None,
) -> int:
    """Return the steps."""
    return steps


@ranged
@dataclass
class Options:
    dropout: Share
    momentum: float = 0.0


@ranged
class Part:
    def __init__(self, *, size: Annotated[int, Gt(1), Lt(9)], name: str = "x") -> None:
        self.size = size


class Special(Part):
    def __init__(self, *, more: Count, size: int) -> None:
        super().__init__(size=size)


@pytest.mark.parametrize(
    ("attempt", "problem"),
    [
        (lambda: call(0), "steps must be at least 1, got 0"),
        (lambda: call(steps=-3), "steps must be at least 1, got -3"),
        (lambda: call(1, warmup=-1), "warmup must be at least 0, got -1"),
        (lambda: call(1, warmup=1.5), "warmup must be at least 0 and at most 1, got 1.5"),
        (lambda: call(1, sizes=[1, 0]), "sizes[1] must be at least 1, got 0"),
        (lambda: call(1, pair=[0.5]), "pair must be 2 numbers, got 1"),
        (lambda: call(1, pair=(0.5, 1.0)), "pair[1] must be at least 0 and below 1, got 1.0"),
        (lambda: call(1, rate=0), "rate must be above 0, got 0"),
        (lambda: call(1, rate=math.inf), "rate must be a finite number, got inf"),
        (lambda: call(1, rate="fast"), "rate must be a number, got 'fast'"),
        (lambda: call(2**63), "steps must be within 64 bits (at most 9223372036854775807), got 2^63 or more"),
        (lambda: Options(dropout=1), "dropout must be at least 0 and below 1, got 1"),
        (lambda: Options(dropout=math.nan), "dropout must be a finite number, got nan"),
        (lambda: Part(size=9), "size must be above 1 and below 9, got 9"),
        (lambda: Special(more=1, size=1), "size must be above 1 and below 9, got 1"),
    ],
)
def test_an_argument_outside_its_range_is_refused_in_one_line(attempt, problem):
    with pytest.raises(ValueError, match=re.escape(problem)) as raised:
        attempt()
    assert str(raised.value) == problem


def test_arguments_within_their_ranges_pass():
    assert call(2**63 - 1, warmup=7, sizes=[1], rate=1e-300) == 2**63 - 1
    assert call(1, warmup=1.0, sizes=None, rate=None) == 1
    assert Options(0, -math.inf).momentum == -math.inf  # no range is declared
    assert Part(size=2).size == 2


def test_what_a_signature_says_stays_readable():
    assert inspect.signature(call).parameters["steps"].annotation == Count
    assert list(inspect.signature(Part).parameters) == ["size", "name"]
    assert (call.__name__, call.__doc__) == ("call", "Return the steps.")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 2**63, -(2**64), 10**400])
def test_no_number_is_taken_that_is_not_finite_or_not_64_bits(number):
    assert refusal(number) is not None
