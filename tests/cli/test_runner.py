import logging
import os
import subprocess
import sys
import textwrap

import pytest
from hydra.core.global_hydra import GlobalHydra

from performer_lm.cli import Sweep, UsageError, main

ENTRY = """
    import os, sys, time
    from pathlib import Path
    from performer_lm.cli import UsageError, main

    def run(cfg):
        print(f"ran {cfg.seed} {cfg.prompt!r}", flush=True)
        if cfg.seed == 9:
            raise ValueError("deep")

    if __name__ == "__main__":
        main(run, config_name="train", config_path=Path(__file__).parent / "configs",
             keys={"seed": int, "prompt": str, "ckpt": str | None})
    """


@pytest.fixture
def entry(tree, tmp_path):
    """Return a function that runs a small entry point as a user would."""
    (tmp_path / "train.py").write_text(textwrap.dedent(ENTRY))

    def run(*argv, **environment):
        return subprocess.run(
            [sys.executable, "train.py", *argv],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def call(tree, tmp_path, monkeypatch):
    """Return a function that calls `main` in this process, and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", logging.root.handlers[:])  # Hydra adds its own
    monkeypatch.setattr(logging.root, "level", logging.root.level)

    def run(task, *argv, sweep=None):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as raised:
            main(task, config_name="train", config_path=tree, keys=KEYS, sweep=sweep)
        assert not GlobalHydra.instance().is_initialized()
        return raised.value.code

    return run


SWEEP = Sweep(folder_key="ckpt", close=lambda folder: None)
KEYS = {"seed": int, "prompt": str, "ckpt": str | None}


def test_the_task_gets_the_config_as_typed(call):
    seen = []
    assert call(seen.append, "attn=flash", "prompt=def main( ${x}", "seed=4", "debug=fast") == 0
    [cfg] = seen
    assert (cfg.prompt, cfg.seed, cfg.attn.nesterov, "hydra" in cfg) == ("def main( ${x}", 4, True, False)


def test_a_sweep_runs_every_job_though_one_fails(call, capsys):
    seen = []

    def task(cfg):
        seen.append(cfg.seed)
        if cfg.seed == 2:
            raise UsageError("two is one too many")
        if cfg.seed == 3:
            raise FloatingPointError("nan")

    assert call(task, "-m", "seed=1,2,3,4", "prompt=a,b", sweep=SWEEP) == 2
    assert seen == [1, 2, 3, 4]
    shown = capsys.readouterr().err
    assert "error: job 1 (seed=2 prompt='a,b'): two is one too many" in shown
    assert "error: job 2 (seed=3 prompt='a,b'): nan" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (FloatingPointError("x"), 3),
        (MemoryError("x"), 4),
        (KeyboardInterrupt(), 130),
        (OSError("x"), 1),
    ],
)
def test_the_exit_code_says_what_happened(call, error, code):
    def task(cfg):
        raise error

    assert call(task) == code


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["attn=falsh"], ["attn=falsh: no such choice; did you mean attn=flash? (choices: exact, favor, flash)"]),
        (["optimizer.lr=abc"], ["optimizer.lr: wanted float, got 'abc' (str)"]),
        (
            ["optimizer.lr=abc", "optimizer.betas=[0.9,x]"],
            [
                "optimizer.lr: wanted float, got 'abc' (str)",
                "optimizer.betas[1]: wanted float, got 'x' (str)",
            ],
        ),
        (["+foo=1"], ["foo: unknown key"]),
        (["+ckpt.x=1"], ["ckpt: wanted str or null, got a section without _target_"]),
        (["seed=${nope}"], ["seed: ${nope} does not resolve: Interpolation key 'nope' not found"]),
        (["-m", "seed=1,2"], ["--multirun: train.py runs once; give each key one value"]),
        (
            ["-m", "attn=favor,falsh"],
            ["attn=falsh: no such choice; did you mean attn=flash? (choices: exact, favor, flash)"],
        ),
        (
            ["--cfg", "job", "attn=falsh"],
            ["attn=falsh: no such choice; did you mean attn=flash? (choices: exact, favor, flash)"],
        ),
        (["--resolve"], ["The --resolve flag can only be used in conjunction with --cfg or --help"]),
        (["--zzzz"], ["--zzzz: no such option"]),
    ],
)
def test_bad_input_is_told_before_anything_is_run_or_written(call, capsys, tmp_path, argv, lines):
    before = sorted(tmp_path.rglob("*"))

    def task(cfg):
        pytest.fail("ran")

    assert call(task, *argv) == 2
    assert capsys.readouterr().err == "".join(f"error: {line}\n" for line in lines)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sweep_is_checked_whole_before_its_first_job(call, capsys):
    assert call(lambda cfg: pytest.fail("ran"), "-m", "seed=1,2,x", sweep=SWEEP) == 2
    assert capsys.readouterr().err == "error: seed: wanted int, got 'x' (str)\n"


def test_a_config_file_sweeps_nothing_that_runs_once(call, capsys, tree):
    (tree / "debug" / "sweep.yaml").write_text("# @package _global_\nhydra: {mode: MULTIRUN}\n")
    assert call(lambda cfg: pytest.fail("ran"), "debug=sweep") == 2
    assert capsys.readouterr().err == "error: --multirun: train.py runs once; give each key one value\n"


def test_dangerous_targets_are_refused_before_hydra_sees_them(call, capsys, tmp_path):
    def task(cfg):
        pytest.fail("ran")

    target = ["_target_=pathlib.Path.write_text", "+optimizer.self=x", "+optimizer.data=x"]
    assert call(task, f"optimizer.{target[0]}", *target[1:]) == 2
    assert call(task, "+hydra.callbacks.x._target_=os.system", "+hydra.callbacks.x.command=touch marker") == 2
    assert "may not be built from a config" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()


def test_what_hydra_offers_still_works(call, capsys, tmp_path):
    def task(cfg):
        pytest.fail("ran")

    assert call(task, "--cfg", "job", "-p", "optimizer") == 0
    assert "_target_: torch.optim.AdamW" in capsys.readouterr().out
    assert call(task, "--help") == 0
    assert "attn: exact, favor, flash" in capsys.readouterr().out
    assert call(task, "--info", "searchpath") == 0


def test_the_environment_is_left_as_it_was(call, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    seen = []
    assert call(lambda cfg: seen.append(os.environ.get("HYDRA_FULL_ERROR"))) == 0
    assert seen == [None]
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_tracebacks_are_shown_to_those_who_ask(call, monkeypatch, capsys):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert call(print, "attn=falsh") == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith(
        "error: attn=falsh: no such choice; did you mean attn=flash? (choices: exact, favor, flash)\n"
    )


def test_as_a_user_runs_it(entry, tmp_path):
    done = entry("prompt=def main(", "seed=3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran 3 'def main('\n", "")
    failed = entry("seed=9")
    assert failed.returncode == 1
    assert "train.py" in failed.stderr
    assert failed.stderr.endswith("error: ValueError: deep\n")


def test_help_loads_nothing_heavy(entry):
    code = "import sys, performer_lm.cli; raise SystemExit(bool({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert "Powered by Hydra" in entry("--help").stdout
