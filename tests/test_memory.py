from mmap import mmap
from pathlib import Path

import pytest
import torch

from performer_lm.memory import peak_memory, reset_peak_memory, sizes_told

CPU = torch.device("cpu")
needs_status = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")


@needs_status
def test_the_peak_is_that_of_what_was_held_for_a_while() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    with mmap(-1, 64 * 2**20) as held:  # straight from the system, since an allocator may keep what it is given back
        for _ in range(64):
            held.write(b"1" * 2**20)
    assert 60 * 2**20 < peak_memory(CPU) - before < 80 * 2**20
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < before + 16 * 2**20


def test_each_kind_of_accelerator_tells_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []

    def reset(device: torch.device) -> None:
        if device not in used:
            raise RuntimeError("Invalid device argument")  # as CUDA says before its first tensor

    monkeypatch.setattr(torch, "empty", lambda *size, device: used.append(device))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7)
    for kind, held in (("cuda", 5), ("xpu", 5), ("mps", 7)):
        reset_peak_memory(torch.device(kind))
        assert peak_memory(torch.device(kind)) == held


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), torch.OutOfMemoryError("no room"), RuntimeError("Allocator: can't allocate memory")],
    ids=["host", "device", "CPU"],
)
def test_sizes_are_added_to_a_lack_of_memory(error: Exception) -> None:
    with pytest.raises(type(error)) as found, sizes_told(CPU, micro_batch="4 x 8 tokens", vocabulary=257):
        raise error
    [note] = found.value.__notes__
    assert note.startswith("micro-batch 4 x 8 tokens, vocabulary 257; at most ")
    assert note.endswith(" GiB were held on cpu")


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_other_errors_pass_as_they_are(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="wrong") as found, sizes_told(CPU):
        raise kind("wrong")
    assert not hasattr(found.value, "__notes__")
