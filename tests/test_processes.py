"""Several processes as one run: DDP, FSDP2, torchrun, SLURM, and what happens when one of them dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from performer_lm import checkpoint
from performer_lm.training.loggers.record import read_metrics

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "train.py")
TINY = ["debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes", "optimizer=adamw"]
TINY += ["attn=favor", "attn/features=optimal", "attn.redraw_interval=2"]
TWO = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.timeout=0.5"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

pytestmark = pytest.mark.slow


def run(folder: Path, *words: str, code: int = 0, command: tuple[str, ...] = (TRAIN,), **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command, *words],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def record(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in rows]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, lines: str) -> Path:
    """Return a folder with a text, a run of one process, and the same one on two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text(lines)
    for name, options in (("one", []), ("ddp", ["trainer=ddp", *TWO]), ("fsdp", ["trainer=fsdp", *TWO])):
        told = run(folder, *TINY, *options, "trainer.max_steps=6", f"run_dir=runs/{name}")
        assert "Warning" not in told
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(place: Path, strategy: str) -> None:
    one, two = record(place / "runs" / "one"), record(place / "runs" / strategy)
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4 if "train/grad_norm" in ours else 1e-5)
        assert theirs.get("train/loss", 0) == pytest.approx(ours.get("train/loss", 0), rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_go_on_exactly_as_two(place: Path, strategy: str) -> None:
    shutil.copytree(place / "runs" / strategy, place / "runs" / f"{strategy}-again", symlinks=True)
    [middle] = (place / "runs" / f"{strategy}-again" / "checkpoints").glob("step=000004*.ckpt")
    told = run(place, *TINY, f"trainer={strategy}", *TWO, "trainer.max_steps=6", f"ckpt={middle}")
    assert "resumed at step 4" in told
    assert record(place / "runs" / f"{strategy}-again") == record(place / "runs" / strategy)


@pytest.mark.parametrize(("before", "after"), [("one", "fsdp"), ("one", "ddp"), ("ddp", "fsdp"), ("fsdp", "one")])
def test_weights_and_optimizer_states_go_on_alike_on_other_processes(place: Path, before: str, after: str) -> None:
    folder = f"runs/{before}-{after}"
    shutil.copytree(place / "runs" / before, place / folder, symlinks=True)
    [middle] = (place / folder / "checkpoints").glob("step=000004*.ckpt")
    options = [] if after == "one" else [f"trainer={after}", *TWO]
    run(place, *TINY, *options, "trainer.max_steps=6", f"ckpt={middle}", "resume.allow=[fingerprint.ranks]")
    for ours, theirs in zip(record(place / "runs" / "one"), record(place / folder), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)


@pytest.mark.parametrize("typed", ["attn=flash", "attn/features=learned"])
def test_another_backend_goes_on_with_what_the_optimizer_knows_where_weights_are_shared_out(
    place: Path, typed: str
) -> None:
    folder = f"runs/{typed.replace('/', '-')}"
    shutil.copytree(place / "runs" / "fsdp", place / folder, symlinks=True)
    words = [word for word in TINY if not word.startswith("attn")]
    told = run(place, *words, typed, "trainer=fsdp", *TWO, "trainer.max_steps=8", f"ckpt={folder}",
               "resume.allow=[model.attn]")  # fmt: skip
    assert "the attention backend changed" in told
    assert ("the optimizer starts anew on 2 of" in told) == ("learned" in typed)
    assert record(place / folder)[-1]["step"] == 8


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_two_processes_save_one_opens_and_goes_on_from(place: Path, strategy: str) -> None:
    saved = checkpoint.read(place / "runs" / strategy / "checkpoints" / "last.ckpt")
    one = checkpoint.read(place / "runs" / "one" / "checkpoints" / "last.ckpt")
    assert {name: value.shape for name, value in saved.weights.items()} == {
        name: value.shape for name, value in one.weights.items()
    }
    assert len(saved.content["random"]) == 2
    checkpoint.open_model(saved)
    told = run(place, *TINY, f"ckpt=runs/{strategy}", "trainer.max_steps=8", code=2)
    assert "fingerprint.ranks was 2, is 1" in told
    run(place, *TINY, f"ckpt=runs/{strategy}", "trainer.max_steps=8", "resume.allow=[fingerprint.ranks]")
    assert record(place / "runs" / strategy)[-1]["step"] == 8


WATCHED = """
import json, runpy, sys
import torch
from lightning.pytorch import Callback
from performer_lm.training import prepare as module

class Watch(Callback):
    seen = 0
    def on_train_batch_end(self, trainer, task, *arguments):
        for name, value in [*task.model.named_buffers(), *task.model.named_parameters()]:
            if name.endswith("pending"):
                continue  # what a rank has seen by itself; all add it up before the next step
            found = [torch.empty_like(value) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(found, value.detach())
            assert torch.equal(*found), f"{name} at step {trainer.global_step}"
            self.seen += "projection" in name
    def on_train_end(self, trainer, task):
        print(f"rank {trainer.global_rank}: {self.seen} projections in {trainer.callbacks[0].folder.path}", flush=True)

attach = module.attach
module.attach = lambda trainer, *, callbacks, **rest: attach(trainer, callbacks=[*callbacks, Watch()], **rest)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_under_torchrun_projections_are_equal_on_every_rank_after_every_step(place: Path) -> None:
    (place / "watched.py").write_text(WATCHED)
    launch = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29731", "watched.py", TRAIN)
    told = run(place, *TINY, "trainer=ddp", *TWO, "trainer.max_steps=5", "run_dir=runs/watched", command=launch)
    for rank in (0, 1):
        assert f"rank {rank}: 10 projections in runs/watched" in told  # 2 layers, 5 steps; and one folder
    assert len(record(place / "runs" / "watched")) == 5 + 3
    assert [path.name for path in (place / "runs").glob("watched*")] == ["watched"]


def test_a_sweep_over_two_processes_runs_each_job_on_both(place: Path) -> None:
    run(place, "-m", *TINY, "trainer=ddp", *TWO, "trainer.max_steps=2", "seed=0,1", "run_dir=runs/sweep")
    jobs = sorted(path for path in (place / "runs" / "sweep").iterdir() if path.is_dir())
    assert [path.name for path in jobs] == ["0", "1"]
    for job in jobs:
        assert json.loads((job / "summary.json").read_text())["steps"] == 2
        assert len(checkpoint.peek(job / "checkpoints" / "last.ckpt").content["random"]) == 2


def test_a_rank_that_dies_ends_the_job(place: Path) -> None:
    words = [*TINY, "trainer=ddp", *TWO, "trainer.max_steps=100000", "run_dir=runs/dies"]
    main = subprocess.Popen(
        [sys.executable, TRAIN, *words], cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert main.stdout is not None
    assert any(line.startswith("step 2/") for line in main.stdout)
    [child] = children(main.pid)
    os.kill(child, signal.SIGKILL)
    start = time.monotonic()
    main.communicate(timeout=60)
    assert main.returncode != 0
    assert time.monotonic() - start < 45


def children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture
def srun(place: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Return the processes of a job of two tasks, as SLURM would start them, and a `scontrol` that takes notes."""
    scontrol = place / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text('#!/bin/sh\necho "$@" >> requeued.txt\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    job |= {"SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train", "MASTER_PORT": "29741"}
    job |= {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    words = [*TINY, "trainer=ddp", *TWO, "trainer.max_steps=60", "trainer.val_every=30", "trainer.log_every=1"]
    tasks = [
        subprocess.Popen(
            [sys.executable, TRAIN, *words, "run_dir=runs/slurm", "ckpt=auto"],
            cwd=place,
            env={**ENVIRONMENT, **job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    yield tasks
    for task in tasks:
        task.kill()
        task.wait()
        assert task.stdout is not None
        task.stdout.close()


def test_slurm_s_warning_saves_and_puts_the_job_back(place: Path, srun: list[subprocess.Popen[str]]) -> None:
    assert srun[0].stdout is not None
    assert any(line.startswith("step 3/") for line in srun[0].stdout)
    for task in srun:
        task.send_signal(signal.SIGUSR1)
    codes = [task.wait(timeout=60) for task in srun]
    assert codes == [143, 0]
    assert (place / "requeued.txt").read_text() == "requeue 4711\n"
    saved = checkpoint.peek(place / "runs" / "slurm" / "checkpoints" / "last.ckpt").content["global_step"]
    assert 3 <= saved < 60
    told = srun[0].stdout.read()
    assert f"saved runs/slurm/checkpoints/step={saved:06d}.ckpt" in told
