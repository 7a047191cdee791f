"""`serve.py` as it is typed."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.batch import complete
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM

ROOT = Path(__file__).parents[1]
Invoke = Callable[..., tuple[int, str, str]]


class Saved(NamedTuple):
    """A model, and the folder of its checkpoint `a.ckpt`; `mlm.ckpt` is of one that sees both sides."""

    model: PerformerLM
    folder: Path


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    lively_model: Callable[..., PerformerLM],
    model_section: Callable[..., dict[str, Any]],
) -> Saved:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, words in (("mlm", ["model=performer_encoder", "objective=mlm"]), ("a", [])):
        model = lively_model(*words, "model.depth=1", vocab_size=257).float()
        section = model_section(*words, "model.depth=1", vocab_size=257)
        own = checkpoint.describe(model=section, tokenizer=ByteTokenizer(), fingerprint={}, seed=0)
        weights = {f"model.{key}": value for key, value in model.state_dict().items()}
        checkpoint.save({"performer_lm": own, "state_dict": weights}, folder / f"{name}.ckpt")
    return Saved(model, folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt=none"], "ckpt=none does not exist; nearest: a.ckpt"),
        (["ckpt=mlm.ckpt"], "this model sees both sides of a token (objective=mlm): it does not continue text"),
        (["ckpt=a.ckpt", "port=65536"], "port must be at least 0 and at most 65535, got 65536"),
        (["ckpt=a.ckpt", "max_rows=0"], "max_rows must be at least 1, got 0"),
        (["ckpt=a.ckpt", "timeout=0"], "timeout must be above 0, got 0"),
        (["ckpt=a.ckpt", "host=no.such.host.invalid"], "host=no.such.host.invalid port=8000: "),
        (["ckpt=a.ckpt", "prot=80"], "prot: unknown key; did you mean port?"),
    ],
)
def test_a_mistake_is_one_line(invoke: Invoke, saved: Saved, words: list[str], message: str) -> None:
    shutil.copytree(saved.folder, ".", dirs_exist_ok=True)
    code, out, err = invoke(*words, script="serve.py")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_port_that_is_taken_is_one_line(invoke: Invoke, saved: Saved) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = invoke(f"ckpt={saved.folder}/a.ckpt", f"port={port}", script="serve.py")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: host=127.0.0.1 port={port}: ")
    assert err.endswith("in use; port=0 takes any that is free\n")


def test_without_its_extra_it_says_so_in_one_line(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    code, out, err = invoke("ckpt=a.ckpt", script="serve.py")
    assert (code, out, err) == (2, "", "error: serve.py needs uvicorn: pip install 'performer-lm[serve]'\n")


@pytest.mark.slow
def test_help_names_every_key(invoke: Invoke) -> None:
    code, out, _ = invoke("--help", script="serve.py")
    assert code == 0
    assert out.startswith("Serve a trained model over HTTP")
    for key in ("host: 127.0.0.1", "port: 8000", "max_rows: 64", "prefix_bytes: 268435456"):
        assert key in out


@contextmanager
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `serve.py`, and yield it with its address."""
    command = [sys.executable, str(ROOT / "serve.py"), "ckpt=a.ckpt", "port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout is not None
        told = run.stdout.readline().split()
        yield run, told[told.index("at") + 1].rstrip(";")
    finally:
        run.kill()
        run.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_answers_end_and_then_the_process(saved: Saved, sent: signal.Signals, code: int) -> None:
    asked = {"prompt": "line", "max_tokens": 300, "temperature": 0, "stream": True, "banned_tokens": [256]}
    [[row]] = complete(
        saved.model, ByteTokenizer(), ["line"], max_new_tokens=300, sampler=Sampler(temperature=0, banned_tokens=[256])
    )
    with process(saved.folder) as (run, url), httpx.stream("POST", f"{url}/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        run.send_signal(sent)
        events = [line.removeprefix("data: ") for line in [first, *lines] if line]
        assert events[-1] == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == row.text
        _, err = run.communicate(timeout=30)
    assert run.returncode == code
    assert "Traceback" not in err
    assert err.startswith("closing: answers that are being made are ended; Ctrl-C again breaks them off\n")
