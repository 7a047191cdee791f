import logging
import math
from typing import Any

import pytest
import torch

from performer_lm.training.callbacks.stability import StabilityMonitor


def calm(count: int) -> list[float]:
    return [3.0 + 0.1 * math.sin(5.0 * step) for step in range(count)]


def test_a_spike_is_warned_of_and_logged_once(steps: Any, caplog: pytest.LogCaptureFixture) -> None:
    monitor, shown = StabilityMonitor(window=10, threshold=6.0), steps()
    with caplog.at_level(logging.WARNING, "performer_lm"):
        shown.show(monitor, *calm(30), 5.0, *calm(5))
    assert len(caplog.records) == 1
    assert "step 31: loss 5.000 is a spike" in caplog.text
    found = {step: value for step, name, value in shown.logged if name == "train/loss_z"}
    assert found[31] > 6
    assert all(abs(value) < 3 for step, value in found.items() if step != 31)


def test_the_deviation_is_that_of_the_losses_before(steps: Any) -> None:
    monitor, shown = StabilityMonitor(window=20, threshold=1e9), steps()
    shown.show(monitor, *calm(20), 4.0)
    before = torch.tensor(calm(20))
    expected = (4.0 - before.mean()) / before.std(correction=0)
    assert shown.logged[-1][2] == pytest.approx(float(expected), rel=1e-4)
    assert all(value == 0.0 for _, _, value in shown.logged[:-1])


def test_a_spike_between_logs_is_named_by_its_step(steps: Any, caplog: pytest.LogCaptureFixture) -> None:
    monitor, shown = StabilityMonitor(window=10, threshold=6.0), steps(log_every=10)
    with caplog.at_level(logging.WARNING, "performer_lm"):
        shown.show(monitor, *calm(33), 9.0, *calm(6))
    assert "step 34: loss 9.000" in caplog.text
    assert [step for step, _, _ in shown.logged] == [10, 20, 30, 40]


def test_a_spike_does_not_raise_what_comes_after(steps: Any) -> None:
    monitor, shown = StabilityMonitor(window=10, threshold=6.0), steps()
    shown.show(monitor, *calm(30))
    before = monitor.state_dict()
    shown.show(monitor, 1e6)
    assert monitor.state_dict()["running"] == before["running"]


def test_a_new_level_is_learned_while_it_is_no_spike(steps: Any) -> None:
    monitor, shown = StabilityMonitor(window=10, threshold=6.0), steps()
    shown.show(monitor, *calm(30), *(0.3 + loss for loss in calm(60)))
    assert monitor.state_dict()["running"][1] == pytest.approx(3.3, abs=0.05)


def test_saved_statistics_go_on_exactly(steps: Any) -> None:
    whole, part, rest = (StabilityMonitor(window=10, threshold=6.0) for _ in range(3))
    shown, resumed = steps(log_every=7), steps(log_every=7)
    shown.show(whole, *calm(40))
    resumed.show(part, *calm(40)[:25])
    rest.load_state_dict(part.state_dict())
    resumed.show(rest, *calm(40)[25:])
    assert resumed.logged == shown.logged


@pytest.mark.parametrize(("options", "message"), [((1, 6.0), "window must be"), ((10, 0.0), "threshold must be above")])
def test_useless_options_are_refused(options: tuple[int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StabilityMonitor(window=options[0], threshold=options[1])
