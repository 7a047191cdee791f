"""Sweeps as users meet them: grids, failures, and the launchers and the sweeper of the `sweep` extra."""

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = ["debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes", "trainer.max_steps=2"]
TINY += ["callbacks.samples.max_new_tokens=4"]
Invoke = Callable[..., tuple[int, str, str]]


def needs(plugin: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(f"hydra_plugins.{plugin}") is None
    return pytest.mark.skipif(missing, reason=f"{plugin} is not installed: pip install -e '.[sweep]'")


pytestmark = pytest.mark.usefixtures("text")


def rows(sweep: str) -> list[dict[str, str]]:
    with (Path(sweep) / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_failed_job_loses_no_other_and_shows_in_the_table(invoke: Invoke) -> None:
    code, out, err = invoke("-m", *TINY, "optimizer=adamw", "optimizer.lr=0.01,1e30", "seed=0,1", "run_dir=runs/a")
    assert code == 3
    assert err.count("error: job") == 2
    found = rows("runs/a")
    assert [row["ended"] == "done" for row in found] == [True, True, False, False]
    assert all("at step" in row["ended"] for row in found[2:])
    assert {row["seed"] for row in found} == {"0", "1"}
    assert "val bpb" in out
    assert Path("runs/a/sweep.png").exists()
    assert sorted(path.name for path in Path().iterdir()) == ["data", "runs", "text.txt"]


def test_the_same_command_again_takes_up_what_is_left(invoke: Invoke) -> None:
    words = ["-m", *TINY, "attn=exact,flash", "run_dir=runs/a", "ckpt=auto"]
    assert invoke(*words)[0] == 0
    Path("runs/a/1/summary.json").unlink()
    code, out, _ = invoke(*words)
    assert code == 0
    assert out.count("has finished") == 2
    assert not Path("runs/a/0-2").exists()


@pytest.mark.slow
@needs("hydra_joblib_launcher")
def test_joblib_runs_jobs_side_by_side(invoke: Invoke) -> None:
    words = ["-m", *TINY, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "attn=exact,flash", "run_dir=runs/a"]
    code, _, err = invoke(*words)
    assert code == 0, err
    assert [row["ended"] for row in rows("runs/a")] == ["done", "done"]


@pytest.mark.slow
@needs("hydra_submitit_launcher")
def test_submitit_runs_jobs_in_processes_of_their_own(invoke: Invoke) -> None:
    code, _, err = invoke("-m", *TINY, "hydra/launcher=submitit_local", "attn=exact,flash", "run_dir=runs/a")
    assert code == 0, err
    assert [row["ended"] for row in rows("runs/a")] == ["done", "done"]
    assert Path("runs/a/.submitit").is_dir()


@needs("hydra_optuna_sweeper")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_optuna_chooses_by_bits_per_byte(invoke: Invoke) -> None:
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    code, _, err = invoke("-m", *TINY, *sweeper, "optimizer.lr=tag(log,interval(0.001,0.1))", "run_dir=runs/a")
    assert code == 0, err
    assert len({row["optimizer.lr"] for row in rows("runs/a")}) == 3
    assert "best_value" in Path("runs/a/optimization_results.yaml").read_text()
