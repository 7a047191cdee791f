"""The promise: a run that was killed and resumed is the unbroken one, to the last bit (benchmarks/kill_test.py)."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "kill_test.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("kill_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_killed_runs_are_the_unbroken_ones_and_killed_saves_lose_nothing(tmp_path: Path) -> None:
    elsewhere = tmp_path / "tmp"  # not where checkpoints lie: nothing may be staged there
    elsewhere.mkdir()
    command = [sys.executable, str(SCRIPT), "--cases", "3", "--kills", "2", "--saves", "30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"kills survived (\d+) / tried (\d+)\nsaves killed 30 / checkpoints lost 0", done.stdout)
    assert counts is not None, done.stdout
    assert int(counts[1]) == int(counts[2]) >= 10


def test_the_comparison_sees_one_bit() -> None:
    unequal = load().unequal
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    other.view(torch.int32)[1] ^= 1
    assert list(unequal({"a": [one, 1], "b": float("nan")}, {"a": [one.clone(), 1], "b": float("nan")})) == []
    assert list(unequal({"a": [one]}, {"a": [other]})) == [".a[0]"]
    assert list(unequal({"a": 1, "b": 2}, {"a": 2})) == [".a: 1 / 2", ".b: 2 / None"]
    assert list(unequal([1], [1, 2])) == [": [1] / [1, 2]"]


def test_any_backend_is_killed_in_the_same_cases() -> None:
    make_matrix, backends = load().make_matrix, ["favor", "flash"]
    assert len(make_matrix(backends)) == 32
    cases = make_matrix(["delta"])
    assert len(cases) == 16
    assert all([word for word in case if word.startswith("attn")] == ["attn=delta"] for case in cases)
