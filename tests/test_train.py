"""The training script as its users meet it: right and wrong command lines."""

import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from performer_lm.training.task import LanguageModelTask

ROOT = Path(__file__).parents[1]
TINY = ["debug=fast", "data=files", "data.path=text.txt", "tokenizer=bytes"]
Invoke = Callable[..., tuple[int, str, str]]


pytestmark = pytest.mark.usefixtures("text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attn=falsh"], "attn=falsh: no such choice; did you mean attn=flash?"),
        (["model.dmi=3"], "model.dmi: unknown key; did you mean model.dim?"),
        (["optimizer.lr=abc"], "optimizer.lr: wanted float, got 'abc' (str)"),
        (["model.heads=7"], "dim (32) must be a multiple of heads (7)"),
        (["model/positions=rotary", "model.dim_head=7"], "rotary width must be even"),
        (["attn=local", "attn.window=65"], "window (65) must be at most the context (data.context=64)"),
        (
            ["attn=favor", "attn/features=trig"],
            "attn/features=trig gives signed features, for causal=False without segments only",
        ),
        (
            ["attn=favor", "attn/features=trig", "model.local_heads=1", "model.local.window=8"],
            "attn/features=trig gives signed",
        ),
        (
            ["model=performer_encoder", "objective=mlm", "data.documents=packed", "attn/features=trig"],
            "attn/features=trig gives signed",
        ),
        (["data.path=txet.txt"], "data.path=txet.txt does not exist; did you mean text.txt?"),
        (["data.path=empty.txt"], "empty"),
        (["data.path=short.txt"], "has 12 tokens for training; one window needs 65"),
        (["data.path=broken.txt"], "broken.txt"),
        (["ckpt=runs/nothing"], "ckpt=runs/nothing does not exist; there are no checkpoints yet"),
        (["ckpt=text.txt"], "text.txt is not a checkpoint of performer_lm"),
        (["data.batch_size=4", "trainer.accumulate_grad_batches=3"], "data.batch_size (4) must be a multiple of"),
        (["trainer.devices=0"], "trainer: `Trainer(devices=0)` value is not a valid input"),
        (["schedule.warmup=7"], "schedule.warmup (7 steps) must be within 0..4, the length of the run"),
        (["schedule.warmup=1.5"], "schedule.warmup must be at least 0 and at most 1, got 1.5"),
        (["schedule=wsdd"], "schedule=wsdd: no such choice; did you mean schedule=wsd?"),
        (["callbacks.ema.decay=2"], "callbacks.ema.decay must be above 0 and below 1"),
        (["callbacks=[default,emma]"], "callbacks=emma: no such choice; did you mean callbacks=ema?"),
        (["callbacks.time_limit.minuets=2"], "did you mean callbacks.time_limit.minutes?"),
        (["experiment=nothing"], "experiment=nothing: no such choice"),
        (["debug=fats"], "debug=fats: no such choice; did you mean debug=fast?"),
        (["-m", "attn=flash,falsh"], "attn=falsh: no such choice"),
        (["model/absolute=learned", "model.absolute.max_len=8"], "model.absolute has 8 places, for 64 tokens"),
        (
            ["trainer.accelerator=tpu"],
            "trainer.accelerator: wanted 'auto' or 'cpu' or 'gpu' or 'cuda' or 'mps', got 'tpu'",
        ),
        (
            ["trainer.matmul_precision=hihg"],
            "trainer.matmul_precision: wanted 'highest' or 'high' or 'medium', got 'hihg'",
        ),
        (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val must be at least 0, got -1"),
        (["trainer.gradient_clip_val=nan"], "trainer.gradient_clip_val must be a finite number, got nan"),
        (["optimizer.momentum=1"], "optimizer.momentum must be at least 0 and below 1, got 1"),
        (["optimizer.betas=[0.9,1.5]"], "optimizer.betas[1] must be at least 0 and below 1, got 1.5"),
        (["model.dropout=nan"], "model.dropout must be a finite number, got nan"),
        (["model.depth=1000000000"], "model.depth must be at least 1 and at most 4096, got 1000000000"),
        (["data.batch_size=9223372036854775808"], "data.batch_size must be within 64 bits"),
        (["seed=-1"], "seed must be at least 0 and at most 4294967295, got -1"),
        (["~optimizer.lr"], "optimizer.lr: missing"),
        (["attn.redraw_interval=5"], "unknown key; these have it: attn=favor, attn=linear, attn=relu"),
        (["attn=flash", "attn.window=5"], "attn.window: unknown key; this has it: attn=local"),
        (["attn.features.learned=true"], "these have it: attn/features=hyperbolic, attn/features=learned"),
        (["schedule.decay=0.5"], "schedule.decay: unknown key; this has it: schedule=wsd"),
        (["attn/features=optimal"], "attn=delta keeps no running averages, which attn=favor does"),
        (["~attn.num_features"], "performer_lm.attention.delta.DeltaAttention.num_features: missing"),
        (["~data.path"], "data.path: missing; wanted str or null"),
        (["~resume"], "resume.allow: missing; wanted a list of str"),
        (["~optimizer"], "optimizer: missing; wanted a factory"),
        (["~callbacks"], "~callbacks: to choose none write callbacks=[]"),
        (["+callbacks.x={}"], "callbacks.x: wanted a section with _target_ or null, got a section without _target_"),
        (["+hydra.job.env_set.A=b"], "+hydra.job.env_set.A: not for users to set"),
        (["attn=hybrid", "attn.pattern=[favor,flahs]"], "no backend 'flahs'; did you mean 'flash'?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(invoke: Invoke, arguments: list[str], message: str) -> None:
    Path("empty.txt").touch()
    Path("short.txt").write_text("0123456789")
    Path("broken.txt").write_bytes(b"fine so far \xff\xfe and on" * 100)
    before = set(Path().iterdir())
    code, out, err = invoke(*TINY, *arguments)
    assert (code, out) == (2, "")
    told = [line for line in err.splitlines() if not line.startswith("data: ")]  # the progress of tokenizing
    assert len(told) == 1
    assert told[0].startswith("error: ")
    assert message in told[0]
    assert set(Path().iterdir()) - before <= {Path("data")}


@pytest.mark.parametrize(
    "options", [["~callbacks.samples", "~callbacks.ema"], ["callbacks=[]", "logger=[]"], ["~compile"]]
)
def test_what_may_be_left_out_is(invoke: Invoke, options: list[str]) -> None:
    code, out, err = invoke(*TINY, *options)
    assert ("best val bpb" in out, code) == ((False, 2) if "~compile" in options else (True, 0)), err


def test_typed_text_stays_as_typed_through_a_run(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path().absolute()))
    Path("text.txt").rename("a ${seed}.txt")
    words = ["data.path=a ${seed}.txt", "callbacks.samples.prompt=${seed}, ", "run_dir=~/b/${seed}"]
    code, out, err = invoke(*TINY, *words, "logger=tensorboard")
    assert code == 0, err
    folder = Path("b/${seed}")
    assert "\n${seed}, " in (folder / "samples.txt").read_text()
    assert list(folder.glob("tensorboard/**/events*"))
    assert sorted(path.name for path in Path().iterdir()) == ["a ${seed}.txt", "b", "data"]
    resume = next(line for line in out.splitlines() if line.startswith("resume"))
    assert all(word in shlex.split(resume) for word in words[:2])
    assert invoke(*shlex.split(resume)[3:])[0] == 0


def test_invalid_utf8_names_file_and_offset(invoke: Invoke) -> None:
    Path("broken.txt").write_bytes(b"0123456789\xff")
    _, _, err = invoke(*TINY, "data.path=broken.txt")
    assert "broken.txt" in err
    assert "10" in err


def test_train_resume_generate_evaluate(invoke: Invoke, pictures: None) -> None:
    code, out, err = invoke(*TINY)
    assert code == 0, err
    assert "best val bpb" in out
    assert Path("runs/latest/metrics.png").read_bytes().startswith(b"\x89PNG")
    assert 'prompt="def main("' in out
    resume = next(line for line in out.splitlines() if line.startswith("resume"))
    assert resume.split(maxsplit=3)[1:3] == ["python", "train.py"]
    code, out, err = invoke(*resume.split()[3:])
    assert code == 0, err
    assert "resumed at step 4" in out
    options = ["max_new_tokens=12", "prompt=line = ${x}, 'a'("]
    code, out, err = invoke(*options, script="generate.py")
    assert code == 0, err
    assert out.startswith("line = ${x}, 'a'(")
    for attn in ([], ["attn=exact"], ["attn=favor"]):
        code, out, err = invoke("data=files", "data.path=text.txt", "data.context=64", *attn, script="evaluate.py")
        assert code == 0, err
        assert "bits per byte" in out


def test_generating_twice_with_one_seed_is_the_same(invoke: Invoke, trained: Invoke) -> None:
    trained(*TINY)
    texts = [invoke("max_new_tokens=12", "seed=3", script="generate.py")[1] for _ in range(2)]
    greedy = [invoke("max_new_tokens=12", "temperature=0", f"seed={seed}", script="generate.py")[1] for seed in (1, 2)]
    assert texts[0] == texts[1]
    assert greedy[0] == greedy[1]


def test_what_is_printed_is_the_text_alone_and_notes_go_elsewhere(invoke: Invoke, trained: Invoke) -> None:
    trained(*TINY)
    code, out, err = invoke("attn=exact", "max_new_tokens=3", "prompt=line", script="generate.py")
    assert code == 0, err
    assert out.startswith("line")
    assert "note: the attention backend changed" in err
    for odd in ("temperature=1e-45", "top_p=1e-300", "repetition_penalty=1e39"):
        assert invoke(odd, "max_new_tokens=3", script="generate.py")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt=runs/nothing"], "does not exist; nearest: runs/"),
        (["-m", "seed=1,2"], "--multirun: generate.py runs once; give each key one value"),
        (["device=meta"], "device=meta is not available (this machine has cpu"),
        (["temperature=inf"], "temperature must be a finite number, got inf"),
        (["temperature=-1"], "temperature must be at least 0"),
        (["top_k=0"], "top_k must be at least 1"),
        (["max_new_tokens=0"], "max_new_tokens must be at least 1"),
        (["prompt=\udcff"], "text cannot be written as UTF-8"),
        (["device=cuda:99"], "device=cuda:99 is not available"),
        (["attn=falsh"], "attn=falsh: no such choice; did you mean attn=flash?"),
        (["tempreature=1"], "tempreature: unknown key; did you mean temperature?"),
    ],
)
def test_a_mistake_in_generating_is_one_line(
    invoke: Invoke, trained: Invoke, arguments: list[str], message: str
) -> None:
    trained(*TINY)
    code, out, err = invoke(*arguments, script="generate.py")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_run_that_diverges_stops_with_code_3(invoke: Invoke) -> None:
    code, _, err = invoke(*TINY, "optimizer=adamw", "optimizer.lr=1e30", "schedule.warmup=0", "trainer.max_steps=20")
    assert code == 3
    told = [line for line in err.splitlines() if not line.startswith("data: ")]
    assert len(told) == 1
    assert re.search(r"the (loss|gradient norm) is (nan|inf) at step \d+ .*; its batch and norms lie in runs/", told[0])
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize("allocates", [torch.OutOfMemoryError("Allocation on device 0"), None], ids=["device", "CPU"])
def test_a_run_without_memory_says_what_for(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, allocates: Exception | None
) -> None:
    def step(self: object, batch: object, batch_idx: int) -> torch.Tensor:
        if allocates:
            raise allocates
        return torch.empty(2**50)

    monkeypatch.setattr(LanguageModelTask, "training_step", step)
    code, _, err = invoke(*TINY, "trainer.accumulate_grad_batches=2")
    assert code == 4
    told = [line for line in err.splitlines() if not line.startswith("data: ")]
    assert told[0].startswith("error: out of memory: ")
    assert "micro-batch 2 x 64 tokens x width 32, vocabulary 257; at most" in told[1]
    assert sum("accumulate_grad_batches" in line or "recompute" in line or "data.context" in line for line in told) == 3


@pytest.mark.parametrize("name", ["x$^$y", b"\xff\xfe".decode(errors="surrogateescape"), "[/x] {y} 日本"])
def test_any_name_of_a_folder_trains_to_its_end(invoke: Invoke, pictures: None, name: str) -> None:
    code, _, err = invoke(*TINY, f"run_dir=runs/{name}")
    assert code == 0, err
    assert {"summary.json", "metrics.png", "metrics.csv", "config.yaml"} <= {*os.listdir(f"runs/{name}")}
    assert not any("could not be" in line for line in Path(f"runs/{name}/train.log").read_text().splitlines())
    code, _, err = invoke(*TINY, f"ckpt=runs/{name}", "trainer.max_steps=6")
    assert code == 0, err


def test_a_picture_that_fails_costs_one_warning_and_no_run(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def fail(*arguments: object, **options: object) -> None:
        found.append(Path("runs/a/summary.json").exists())
        raise RuntimeError("no picture\ntoday")

    monkeypatch.setattr("performer_lm.training.loggers.record.draw_metrics", fail)
    monkeypatch.setattr("performer_lm.training.run.card", fail)
    code, out, err = invoke(*TINY, "run_dir=runs/a")
    assert (code, found) == (0, [True, True])
    told = [line for line in (out + err).splitlines() if line.startswith("warning: ")]
    assert [line.rpartition(": ")[2] for line in told] == ["no picture"] * 2


def test_a_terminal_that_knows_no_such_characters_costs_nothing(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    code, _, err = invoke(*TINY, "run_dir=runs/a", "callbacks.samples.prompt='\u2014 '")
    assert code == 0, err
    assert b"\\u2014" in written.getvalue()
    assert "\u2014 " in Path("runs/a/samples.txt").read_text()


@pytest.mark.slow
def test_a_reader_that_goes_costs_nothing(invoke: Invoke) -> None:
    train = shlex.join([sys.executable, str(ROOT / "train.py"), *TINY, "run_dir=runs/a"])
    done = subprocess.run(f"{{ {train}; echo $? > code; }} 2>&1 | head -1", shell=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert Path("code").read_text() == "0\n"
    assert "--- done ---" in Path("runs/a/train.log").read_text()
    assert (Path("runs/a/checkpoints/last.ckpt")).exists()


@pytest.mark.slow
def test_a_disk_without_room_for_what_is_printed_costs_nothing(invoke: Invoke) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *TINY, "run_dir=runs/a"], stdout=full, stderr=full
        )
    assert done.returncode == 0
    assert "--- done ---" in Path("runs/a/train.log").read_text()


def test_a_sweep_numbers_its_jobs(invoke: Invoke) -> None:
    code, _, err = invoke(*TINY, "-m", "attn=exact,flash", "run_dir=runs/sweep")
    assert code == 0, err
    assert sorted(path.name for path in Path("runs/sweep").iterdir() if path.is_dir()) == ["0", "1"]
    assert all((Path("runs/sweep") / str(job) / "summary.json").exists() for job in range(2))


def test_help_answers_at_once() -> None:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "attn: chunked, delta, exact, favor, flash" in done.stdout
    assert "torch" not in done.stderr
    assert time.perf_counter() - start < 30  # a hang, not a speed: benchmarks measure those
