"""Every kind of data through the real scripts: what trains, and how what cannot is told."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

Invoke = Callable[..., tuple[int, str, str]]
SHORT = ["debug=fast", "callbacks.samples.max_new_tokens=4"]
SHORT += ["trainer.max_steps=2", "data.batch_size=2", "data.validation_bytes=2048"]
FILES = [*SHORT, "data=files", "data.path=text.txt", "tokenizer=bytes"]


@pytest.fixture
def folder(text: None) -> None:
    """Fill this test's folder with a table, a set in the hub's form, and texts with a fault each."""
    rows = "".join(json.dumps({"body": f"row {index} says {index * 37 % 101}"}) + "\n" for index in range(300))
    Path("rows.jsonl").write_text(rows)
    Path("stories").mkdir()
    for split in ("train", "validation"):
        Path(f"stories/{split}.jsonl").write_text(rows.replace("body", "text").replace("says", split))
    for name in ("a", "b", "c"):
        Path(f"notes/{name}").mkdir(parents=True)
        Path(f"notes/{name}/note.md").write_text(f"# Note {name}\n" * 40)
    Path("broken.txt").write_bytes(b"fine so far \xff and on" * 100)
    Path("empty.txt").touch()
    Path("byte.txt").write_text("x")
    Path("short.txt").write_text("line of text\n" * 4)
    Path("blank").mkdir()
    for name, content in {"a.txt": "", "b.md": "\N{BYTE ORDER MARK}", "c.jsonl": '{"text": ""}\n'}.items():
        Path("blank", name).write_text(content)
    Path("rows0.jsonl").write_text("\n")
    os.mkfifo("pipe")
    with tarfile.open("notes.tar.gz", "w:gz") as archive:
        archive.add("notes")
    Path("same").mkdir()
    for name in ("one", "two"):
        Path(f"same/{name}.txt").write_text("the same text\n" * 50)


@pytest.mark.parametrize(
    "choice",
    [
        ["data=files", "data.path=text.txt", "data.documents=packed", "attn=flash"],
        ["data=files", "data.path=rows.jsonl", "data.text_column=body", "data.documents=cropped"],
        ["data=files", "data.path=notes/**/*.md", "data.device_resident=true"],
        ["data=files", "data.path=text.txt", "data.validation_path=notes", "data.num_workers=1"],
        ["data=files", "data.path=broken.txt", "data.errors=bytes"],
        ["data=hf", "data.name=stories", "data.validation_split=validation"],
        [
            "data=mixture",
            "data.corpora.files.path=notes",
            "data.weights.files=3",
            "~data.corpora.stdlib",
            "~data.weights.stdlib",
        ],
    ],
    ids=lambda choice: " ".join(choice),
)
def test_every_choice_trains_and_is_evaluated(invoke: Invoke, folder: None, choice: list[str]) -> None:
    code, out, err = invoke(*SHORT, "tokenizer=bytes", *choice)
    assert code == 0, err
    assert "best val bpb" in out
    code, own, err = invoke(script="evaluate.py")
    assert code == 0, err
    assert "bits per byte" in own
    assert "data: " not in err  # the ids that training made are found again
    asked = [item for item in choice if item.partition("=")[0] != "attn"]
    code, part, err = invoke("data.context=64", "data.validation_fraction=0.05", *asked, script="evaluate.py")
    assert (code, part) == (0, own), err  # what was held out is asked for by the same options
    code, out, err = invoke("data.context=64", *asked, script="evaluate.py")
    assert code == 0, err
    is_given = any("validation" in item for item in choice)
    assert is_given or "data: " in err
    assert is_given == (out == own)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_trains_and_goes_on(invoke: Invoke, folder: None, workers: int) -> None:
    stream = ["data=hf", "data.name=stories", "data.streaming=true"]
    common = [*SHORT[:-1], "tokenizer=bytes", *stream]
    common += ["data.validation_split=validation", "data.validation_bytes=500", f"data.num_workers={workers}"]
    code, out, err = invoke(*common, "trainer.val_every=1", "run_dir=runs/a")
    assert code == 0, err
    assert "approximate resume" in err
    code, out, err = invoke(*common, "trainer.val_every=1", "trainer.max_steps=4", "ckpt=runs/a")
    assert code == 0, err
    assert "data: going on at row" in err
    assert "step 4" in out
    code, out, err = invoke("ckpt=runs/a", script="evaluate.py")
    assert code == 0, err
    assert "bits per byte" in out
    code, _, err = invoke("ckpt=runs/a", *stream, script="evaluate.py")
    assert (code, err.splitlines()[-1][:40]) == (2, "error: data.streaming=true keeps no text"), err


def test_a_task_is_trained_scored_and_resumed(invoke: Invoke, text: None) -> None:
    tiny = ["model.dim=32", "model.depth=1", "model.heads=2", "data.context=32", "data.batch_size=16"]
    task = [
        "data=synthetic",
        "data/task=recall",
        "data.task.vocab_size=16",
        "data.task.pairs=2",
        "data.validation_bytes=512",
    ]
    code, out, err = invoke(*tiny, *task, "trainer.max_steps=2", "trainer.val_every=2", "run_dir=runs/a")
    assert code == 0, err
    assert "val/accuracy 0." in out
    assert "samples begin with nothing, for their prompt 'def ' cannot be written" in out
    assert "val accuracy  " in out
    prompt = out.partition(' prompt="')[2].partition('"')[0]
    code, continued, err = invoke(f"prompt={prompt}", "max_new_tokens=1", script="generate.py")
    assert code == 0, err
    assert continued.startswith(prompt)
    logged = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert any(0 <= line.get("val/accuracy", -1) <= 1 for line in logged)
    found = [invoke(*options, script="evaluate.py")[:2] for options in ([], [*task, "data.context=32"])]
    assert found[0] == found[1]
    assert found[0][0] == 0
    assert "accuracy 0." in found[0][1]
    code, _, err = invoke("data=files", "data.path=text.txt", script="evaluate.py")
    assert code == 2
    code, _, err = invoke(*task[:-1], "data.task.pairs=3", "data.task.vocab_size=20", script="evaluate.py")
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: the data have a vocabulary of their own, of 21 ids, and not the checkpoint's, of 17",
    )
    longer = ["trainer.max_steps=4", "trainer.val_every=2"]
    code, out, err = invoke(*tiny, *task, *longer, "ckpt=runs/a")
    assert code == 0, err
    code, _, err = invoke(*tiny, *task, *longer, "data.task.power=1", "ckpt=runs/a")
    assert code == 2
    assert "power" in err


@pytest.mark.parametrize("name", ["recall", "recall_long", "copy", "selective_copy", "induction"])
def test_every_experiment_on_a_task_trains(invoke: Invoke, name: str) -> None:
    short = ["trainer.max_steps=2", "trainer.val_every=2", "data.batch_size=4", "data.validation_bytes=256"]
    code, out, err = invoke(f"experiment={name}", *short)
    assert code == 0, err
    assert "val accuracy  " in out


@pytest.mark.slow
def test_attention_learns_to_recall(invoke: Invoke) -> None:
    code, _, err = invoke("experiment=recall", "attn=flash", "trainer.max_steps=300", "run_dir=runs/a")
    assert code == 0, err
    assert json.loads(Path("runs/a/summary.json").read_text())["last_val_accuracy"] > 0.8


def test_a_task_is_for_an_objective_that_asks_for_answers(invoke: Invoke) -> None:
    code, _, err = invoke("data=synthetic", "model=performer_encoder", "objective=mlm")
    assert code == 2
    assert "objective=mlm learns from text; data=synthetic asks for answers: objective=clm" in err


@pytest.mark.parametrize(
    "tokenizer", [["characters"], ["wordpiece", "tokenizer.vocab_size=600"], ["unigram", "tokenizer.vocab_size=300"]]
)
def test_every_tokenizer_trains_and_generates(invoke: Invoke, folder: None, tokenizer: list[str]) -> None:
    name, *options = tokenizer
    code, _, err = invoke(*FILES[:-1], f"tokenizer={name}", *options, "tokenizer.specials=[mask]")
    assert code == 0, err
    code, out, err = invoke("prompt=line 7", "max_new_tokens=5", script="generate.py")
    assert code == 0, err
    assert out.startswith("line 7")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=txet.txt"], "data.path=txet.txt does not exist; did you mean text.txt?"),
        (["data.path=note*.txt"], "data.path=note*.txt finds no file; the nearest is"),
        (["data.path=rows.jsonl"], "rows.jsonl has no column 'text' (columns: body)"),
        (["data.path=broken.txt"], "broken.txt is not UTF-8 text: byte 0xff at 12; data.errors=replace"),
        (["data.path=empty.txt"], "data.path=empty.txt has no text: 1 document, all empty or left out"),
        (["data.path=byte.txt"], "data.path=byte.txt has 3 tokens for training; one window needs 65 (data.context=64)"),
        (["data.path=short.txt"], "data.path=short.txt has 51 tokens for training; one window needs 65"),
        (["data.validation_path=empty.txt"], "data.validation_path=empty.txt has no text: 1 document, all empty or"),
        (["data.validation_path=blank"], "data.validation_path=blank has no text: 3 documents, all empty or left out"),
        (["data.validation_path=rows0.jsonl"], "data.validation_path=rows0.jsonl has no text: 0 documents"),
        (["data.validation_path=text.txt"], "nothing is left to validate on: the text of all 1 documents held out"),
        (["data.path=notes.tar.gz"], "notes.tar.gz is a tar archive: unpack it first"),
        (["data.path=/dev/zero"], "/dev/zero is a device; only regular files are read"),
        (["data.path=pipe"], "pipe is a named pipe; only regular files are read"),
        (["tokenizer=json", "tokenizer.path=pipe"], "pipe is a named pipe; only regular files are read"),
        (["data.path=same"], "nothing is left to validate on: the text of all"),
        (["data.path=broken.txt", "data.errors=skip"], "data.path=broken.txt has no text: 1 document"),
        (["data.errors=ignore"], "data.errors: wanted 'strict' or 'replace' or 'skip' or 'bytes', got 'ignore'"),
        (["data.documents=paked"], "data.documents: wanted 'stream' or 'packed' or 'cropped', got 'paked'"),
        (["data.validation_fraction=1"], "data.validation_fraction must be above 0 and below 1, got 1"),
        (["data.text_colum=x"], "data.text_colum: unknown key; did you mean data.text_column?"),
        (["data=hf", "data.name=storys"], "at hand on this machine: data.name=stories"),
        (["data.device_resident=true", "data.num_workers=1"], "must be 0 with data.device_resident=true"),
        (["tokenizer=json", "tokenizer.path=text.txt"], "tokenizer.path=text.txt is not JSON"),
        (["tokenizer=json"], "tokenizer=json needs tokenizer.path=FILE"),
        (["tokenizer=characters", "tokenizer.vocab_size=9"], "tokenizer.vocab_size (9) must be at least 257"),
        (["tokenizer.specials=[a b]"], "'a b' must be a name such as mask"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_choice(
    invoke: Invoke, folder: None, arguments: list[str], message: str
) -> None:
    common = [item for item in FILES if not arguments[0].startswith("data=") or item != "data.path=text.txt"]
    code, out, err = invoke(*common, *arguments)
    told = [line for line in err.splitlines() if not line.startswith("data: ")]
    assert (code, out, len(told)) == (2, "", 1), err
    assert message in told[0]
