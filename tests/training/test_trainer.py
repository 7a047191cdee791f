from collections.abc import Iterator
from typing import Any

import pytest
import torch

from performer_lm.training.trainer import make_trainer

SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "val_every": 2,
    "log_every": 1,
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "timeout": 10,
    "precision": "32-true",
    "accumulate_grad_batches": 3,
    "gradient_clip_val": 1.0,
    "deterministic": False,
    "matmul_precision": "highest",
    "save_every": None,
    "save_minutes": None,
    "keep_checkpoints": 2,
}


def test_validation_is_counted_in_optimizer_steps() -> None:
    trainer = make_trainer(**SETTINGS)
    assert trainer.val_check_interval == 6
    assert trainer.max_steps == 4
    assert trainer.precision == "32-true"


@pytest.mark.parametrize("name", ["max_steps", "val_every", "log_every", "accumulate_grad_batches"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make_trainer(**{**SETTINGS, name: 0})


@pytest.mark.parametrize(("norm", "largest"), [(0, None), (0.0, None), (None, None), (0.5, 0.5)])
def test_gradients_are_not_clipped_to_0_or_null(norm: float | None, largest: float | None) -> None:
    assert make_trainer(**{**SETTINGS, "gradient_clip_val": norm}).gradient_clip_val == largest


@pytest.mark.parametrize("devices", [-1, "abc"])
def test_devices_that_a_cpu_cannot_be_are_refused(devices: int | str) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.devices must be auto or at least 1 .*, got {devices}"):
        make_trainer(**{**SETTINGS, "devices": devices})


@pytest.fixture
def _settings_of_torch() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_settings_of_torch")
def test_settings_of_torch_are_those_of_the_last_trainer() -> None:
    """A sweep's jobs share a process."""
    for deterministic, precision in ((True, "high"), (False, "medium"), (True, "highest"), (False, "highest")):
        make_trainer(**{**SETTINGS, "deterministic": deterministic, "matmul_precision": precision})
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.get_float32_matmul_precision() == precision
