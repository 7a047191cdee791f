from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from performer_lm.training.loggers.record import read_metrics
from performer_lm.training.schedule import constant, cosine, inverse_sqrt, linear, warmup_stable_decay

BUILDERS: dict[str, Callable[..., Any]] = {
    "constant": constant,
    "linear": partial(linear, final=0.2),
    "cosine": partial(cosine, final=0.2),
    "wsd": partial(warmup_stable_decay, decay=0.3, final=0.2),
    "inverse_sqrt": inverse_sqrt,
}
every_schedule = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


@every_schedule
@pytest.mark.parametrize("warmup", [0.1, 10])
def test_the_rate_rises_to_its_peak_and_never_again(build: Callable[..., Any], warmup: float) -> None:
    share = build(100, warmup=warmup)
    shares = [share(step) for step in range(120)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(shares) == 1.0
    assert shares[9:] == sorted(shares[9:], reverse=True)


@every_schedule
@pytest.mark.parametrize("warmup", [0, 0.0])
def test_without_warmup_it_starts_at_its_peak(build: Callable[..., Any], warmup: float) -> None:
    assert build(100, warmup=warmup)(0) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_it_ends_at_its_final_share_and_stays(name: str) -> None:
    share = BUILDERS[name](100, warmup=0.1)
    assert share(100) == share(150) == pytest.approx(0.2)
    assert share(99) > 0.2


def test_the_middles() -> None:
    assert linear(100, warmup=0.1, final=0.2)(55) == pytest.approx(0.6)
    assert cosine(100, warmup=0.1, final=0.2)(55) == pytest.approx(0.6)
    assert constant(100, warmup=0.1)(99) == 1.0
    stable = warmup_stable_decay(100, warmup=0.1, decay=40, final=0.2)
    assert [stable(step) for step in (10, 60, 70)] == pytest.approx([1.0, 1.0, 0.6])
    assert inverse_sqrt(100, warmup=25)(99) == pytest.approx(0.5)


def test_the_whole_run_may_be_warmup() -> None:
    for build in (partial(linear, final=0.0), partial(cosine, final=0.0), constant, inverse_sqrt):
        assert build(10, warmup=1.0)(9) == 1.0
    assert warmup_stable_decay(10, warmup=0.0, decay=1.0, final=0.0)(0) == 1.0


@pytest.mark.parametrize("build", [constant, inverse_sqrt, partial(warmup_stable_decay, decay=10, final=0.0)])
def test_what_does_not_depend_on_the_length_of_the_run(build: Callable[..., Any]) -> None:
    short, long = build(50, warmup=5), build(500, warmup=5)
    assert [short(step) for step in range(41)] == [long(step) for step in range(41)]


@every_schedule
def test_a_resumed_schedule_goes_on(build: Callable[..., Any]) -> None:
    def make() -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        return optimizer, LambdaLR(optimizer, build(20, warmup=0.2))

    def rates(optimizer: torch.optim.Optimizer, schedule: LambdaLR, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    whole, part, rest = make(), make(), make()
    expected = rates(*whole, 20)
    assert expected == [0.5 * build(20, warmup=0.2)(step) for step in range(20)]
    first = rates(*part, 7)
    for fresh, saved in zip(rest, part, strict=True):
        fresh.load_state_dict(saved.state_dict())
    assert first + rates(*rest, 13) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cosine(10, warmup=1.5, final=0.1), r"warmup must be at least 0 and at most 1, got 1\.5"),
        (lambda: constant(10, warmup=-0.1), "warmup must be at least 0"),
        (lambda: linear(10, warmup=11, final=0.1), r"schedule\.warmup \(11 steps\) must be within 0\.\.10"),
        (lambda: cosine(10, warmup=0.1, final=-1), "final must be at least 0"),
        (lambda: linear(10, warmup=0.1, final=2), "final must be at least 0 and at most 1"),
        (
            lambda: warmup_stable_decay(10, warmup=4, decay=0.7, final=0),
            r"warmup \(4 steps\) and .*decay \(7\) are lon",
        ),
        (lambda: warmup_stable_decay(10, warmup=4, decay=-1, final=0), "decay must be at least 0, got -1"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_schedule_trains(start: Callable[..., Any], name: str) -> None:
    start(f"schedule={name}", "schedule.warmup=2", "callbacks=[]", "run_dir=runs/a").fit()
    rates = [row["train/lr"] for row in read_metrics(Path("runs/a/metrics.jsonl")) if "train/lr" in row]
    assert rates[:2] == pytest.approx([3e-3, 6e-3])
