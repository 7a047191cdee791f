"""What goes wrong around a run: damaged files, full disks, folders without leave, signals (RELIABILITY: C3-C9)."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from performer_lm import checkpoint, writing
from performer_lm.training.loggers.record import read_metrics

ROOT = Path(__file__).parents[1]
TINY = ["debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes", "callbacks.samples.max_new_tokens=4"]
Invoke = Callable[..., tuple[int, str, str]]


pytestmark = pytest.mark.usefixtures("text")


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def cut_to_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1])


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_by_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def forge_the_checksum(path: Path) -> None:
    checkpoint.sidecar_of(path).write_text(f"{'0' * 64}  {path.name}\n")


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGES = [cut_to_nothing, cut_to_a_byte, cut_in_half, cut_by_a_byte, flip_a_bit, fill_with_zeros, forge_the_checksum]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_auto_falls_back_and_says_so_and_a_name_is_refused(
    damage: Callable[[Path], None], invoke: Invoke, trained: Invoke
) -> None:
    assert trained(*TINY, "run_dir=runs/a")[0] == 0
    last = Path("runs/a/checkpoints/last.ckpt").resolve()
    [before] = (path for path in checkpoint.named_by_step(last.parent) if path != last)
    damage(last)
    for named in ("runs/a", f"runs/a/checkpoints/{last.name}"):
        code, _, err = invoke(*TINY, f"ckpt={named}", "trainer.max_steps=6")
        assert code == 2
        assert "is damaged: its content does not match" in err
        assert f"to go on from the one before it: ckpt={before.parent}/{before.name}" in err
    code, out, err = invoke(*TINY, "ckpt=auto", "run_dir=runs/a", "trainer.max_steps=6")
    assert code == 0, err
    assert "is damaged" in out
    assert f"going on from runs/a/checkpoints/{before.name} instead" in out
    assert [row["step"] for row in read_metrics(Path("runs/a/metrics.jsonl")) if "train/loss" in row][-1] == 6


@pytest.mark.parametrize("damage", [make_a_folder, make_a_loop], ids=lambda damage: damage.__name__)
def test_what_is_no_file_is_told(damage: Callable[[Path], None], invoke: Invoke, trained: Invoke) -> None:
    assert trained(*TINY, "run_dir=runs/a")[0] == 0
    damage(Path("runs/a/checkpoints/last.ckpt").resolve())
    code, _, err = invoke("ckpt=runs/a/checkpoints/last.ckpt", script="generate.py")
    assert (code, len(err.splitlines())) == (2, 1)


def test_a_full_disk_costs_the_new_file_alone(invoke: Invoke) -> None:
    assert invoke(*TINY, "run_dir=runs/a", "trainer.max_steps=2")[0] == 0
    last = Path("runs/a/checkpoints/last.ckpt").resolve()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (last.stat().st_size // 2, limits[1]))
    try:
        code, _, err = invoke(*TINY, "ckpt=runs/a", "trainer.max_steps=4", "schedule=cosine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "step=000004" in err
    assert "cannot be written" in err
    assert "it needs about" in err
    assert checkpoint.read(Path("runs/a/checkpoints/last.ckpt")).path.resolve() == last
    assert list(Path("runs/a/checkpoints").glob("*.tmp")) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_disk_that_fills_up_is_told_by_the_files_name_and_the_run_goes_on_from_its_last_save(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    append_text = writing.append_text

    def fill_up(path: Path, text: str) -> None:
        if path.name == name and ('"step": 4' in text or "step 4" in text):
            append_text(path, text[:5])
            raise writing.unwritable(path, OSError(28, "No space left on device"))
        append_text(path, text)

    with monkeypatch.context() as patched:
        for module in ("loggers.record", "callbacks.samples"):
            patched.setattr(f"performer_lm.training.{module}.append_text", fill_up)
        code, out, err = invoke(*TINY, "run_dir=runs/a", "optimizer=adamw")
    told = [line for line in (out + err).splitlines() if "no space left" in line.lower()]
    assert len(told) == 1
    assert name in told[0]
    assert "Traceback" not in err
    assert code == (1 if name == "metrics.jsonl" else 0)
    assert invoke(*TINY, "run_dir=runs/a", "optimizer=adamw", "ckpt=auto", "trainer.max_steps=6")[0] == 0
    steps = [row["step"] for row in read_metrics(Path("runs/a/metrics.jsonl")) if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_refuses_the_file_is_an_error(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("performer_lm.checkpoint.files.os.replace", refuse)
    code, _, err = invoke(*TINY, "run_dir=runs/a")
    assert code == 1
    assert "permission denied" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_two_runs_in_one_folder_are_refused(invoke: Invoke, trained: Invoke) -> None:
    assert trained(*TINY, "run_dir=runs/a")[0] == 0
    script = "from pathlib import Path; from performer_lm.training.lock import RunLock; import time\n"
    script += "RunLock(Path('runs/a')); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    other.stdout.readline()
    code, _, err = invoke(*TINY, "ckpt=runs/a", "trainer.max_steps=6")
    other.kill()
    other.wait()
    other.stdout.close()
    assert code == 2
    assert f"runs/a is in use by process {other.pid} on" in err
    assert invoke(*TINY, "ckpt=runs/a", "trainer.max_steps=6")[0] == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


LONG = [*TINY, "trainer.max_steps=60", "trainer.val_every=20", "trainer.accumulate_grad_batches=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "line", "times", "code"),
    [
        (signal.SIGTERM, "step 5/", 2, 143),
        (signal.SIGTERM, "step 20  val/loss", 1, 143),  # after validation's last word, before and in the save
        (signal.SIGINT, "step 5/", 1, 130),
        (signal.SIGINT, "run folder", 2, 130),  # at once, before there is a step to save
    ],
)
def test_a_signal_ends_a_real_process_at_a_step_and_it_goes_on_exactly(
    signum: int, line: str, times: int, code: int, invoke: Invoke, whole: Path
) -> None:
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *LONG, "run_dir=runs/a"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    assert any(line in text for text in child.stdout)
    for _ in range(times):
        child.send_signal(signum)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code, out + err
    assert "Traceback" not in err
    if line != "run folder":
        assert f"stopped by {signal.Signals(signum).name}; saved runs/a/checkpoints/step=" in out
        assert "resume with: python train.py" in out
    assert invoke(*LONG, "run_dir=runs/a", "ckpt=auto")[0] == 0
    if not (whole / "metrics.jsonl").exists():
        assert invoke(*LONG, "run_dir=runs/whole")[0] == 0
        shutil.copy("runs/whole/metrics.jsonl", whole)
    rows = [[{k: v for k, v in row.items() if "per_second" not in k} for row in read_metrics(folder / "metrics.jsonl")]
            for folder in (whole, Path("runs/a"))]  # fmt: skip
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_real_process_without_memory_ends_with_code_4_and_says_what_to_lower(invoke: Invoke) -> None:
    big = "data.batch_size=65536"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *TINY, big, "run_dir=runs/a"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)),
    )
    assert done.returncode == 4, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    told = done.stderr[done.stderr.index("error: out of memory: ") :]
    assert "micro-batch 65536 x 64 tokens" in told
    assert "raise trainer.accumulate_grad_batches" in told
    assert not list(Path("runs").rglob("*.ckpt*"))


def test_a_run_whose_weights_overflow_ends_before_its_save(invoke: Invoke) -> None:
    code, out, err = invoke(*TINY, "optimizer.lr=1e41", "trainer.save_every=1", "run_dir=runs/a")
    told = [line for line in err.splitlines() if not line.startswith("data: ")]
    assert (code, len(told)) == (3, 1), err
    assert told[0].startswith("error: the weights are not finite after step 1 (model.")
    assert "Traceback" not in out + err
    assert list(Path("runs/a").rglob("*.ckpt")) == []


def test_a_model_whose_logits_overflow_samples_nothing(invoke: Invoke) -> None:
    content = checkpoint.read(ROOT / "tests/golden/backends/exact.ckpt").content
    content["state_dict"]["model.performer.norm.gain"].fill_(3e38)
    content["state_dict"]["model.head.weight"].mul_(1e3)
    checkpoint.save(content, Path("a.ckpt"))
    code, _, err = invoke("ckpt=a.ckpt", "prompt=line 1", script="generate.py")
    assert code == 3
    assert err == "error: the model's logits are not finite, so there is no next token to draw from them\n"
