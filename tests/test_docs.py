"""The commands and code of README.md and docs/*.md, as a reader would run them: in order, in a folder of their own.

In a ```bash block, every line that starts with `python` and a script of the project runs, shortened to a few steps of a
few tokens; scripts of benchmarks/ need only exist. A block that is not to be run is ```text.
"""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from performer_lm.interop.llama import list_weights
from performer_lm.interop.settings import Settings
from performer_lm.interop.transformers_folder import read_shape

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
STEPS, MORE_STEPS = 2, 4  # of a run, and of one that goes on
TRAIN = {
    "trainer.val_every": "2",
    "data.validation_bytes": "4096",
    "data.context": "256",
    "data.batch_size": "2",
    "callbacks.samples.max_new_tokens": "8",
}
TASK = {"trainer.val_every": "2", "data.validation_bytes": "4096", "data.batch_size": "2"}
EVALUATE = {"data": "files", "data.path": "my.txt", "data.context": "256"}
GENERATE = {"max_new_tokens": "16"}
TASKS = ("recall", "recall_long", "copy", "selective_copy", "induction")
GENERATED = {"data=synthetic", "task=recall", *(f"experiment={task}" for task in TASKS)}
Invoke = Callable[..., tuple[int, str, str]]


def commands(document: Path) -> list[list[str]]:
    """Return the words of every command that starts with `python`, lines that end in a backslash joined."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


def scripts(document: Path) -> list[list[str]]:
    """Return the commands that run: script and arguments."""
    words = [command[1:] for command in commands(document)]
    return [command for command in words if "/" not in command[0] and not command[0].startswith("-")]


def shortened(script: str, arguments: list[str], cache: Path) -> list[str]:
    """Return the arguments with few steps and tokens; what they say themselves stands, but for a run's length."""
    if script == "train.py":
        arguments = [argument for argument in arguments if not argument.startswith("trainer.max_steps=")]
    typed = {argument.partition("=")[0] for argument in arguments}
    generated = bool(GENERATED & {*arguments})
    if script == "train.py":
        resumed = "ckpt" in typed
        short = {**(TASK if generated else TRAIN), "trainer.max_steps": str(MORE_STEPS if resumed else STEPS)}
    else:
        short = {"evaluate.py": {} if generated else EVALUATE, "generate.py": GENERATE}.get(script, {})
        if typed & {"data", "data.path"}:
            short = {key: value for key, value in short.items() if not key.startswith("data")}
    taken_out = tuple(f"{word[1:]}." for word in typed if word.startswith("~"))
    options = [f"{k}={value}" for k, value in short.items() if k not in typed and not k.startswith(taken_out)]
    if script in ("train.py", "evaluate.py") and not generated and not {"--help", "--hydra-help"} & typed:
        options.append(f"data.cache_dir={cache}")
    return [*arguments, *options]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tokenized corpora that all documents share."""
    return tmp_path_factory.mktemp("cache")


def write_texts(folder: Path) -> None:
    """Write the texts that documents name: a file, a folder, a table, and a set in the hub's form."""
    (folder / "my.txt").write_text(" ".join(f"word{number * 7919 % 1000}" for number in range(8_000)))
    (folder / "prompts.txt").write_text("word1 word2\nword3\n")
    rows = [f"row {row} says " + " ".join(f"word{row * number % 1000}" for number in range(30)) for row in range(500)]
    (folder / "my.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    for name in ("notes/one", "notes/two", "stories"):
        (folder / name).mkdir(parents=True)
    for note in range(20):
        (folder / "notes" / ("one", "two")[note % 2] / f"{note}.md").write_text("\n".join(rows[note::20]))
    for split, part in (("train", rows[50:]), ("validation", rows[:50])):
        (folder / f"stories/{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in part))


def write_model(folder: Path) -> None:
    """Write the model of transformers that documents name: of the Llama shape, tiny, and of bytes."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["</s>"])
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = {"model_type": "llama", "num_attention_heads": 4, "eos_token_id": 256, **sizes}
    shape = read_shape(Settings(config, source="config.json"))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(sizes, generator=generator) / 6 for name, sizes in list_weights(shape)}
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


@pytest.mark.readme
@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_works_in_order(
    document: Path, invoke: Invoke, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path)
    write_model(tmp_path / "theirs")
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # of a reader who types nothing
    if any("ckpt=" in word for command in scripts(document)[:1] for word in command):
        assert invoke(*shortened("train.py", [], cache))[0] == 0  # a document may start from a trained model
    previous: list[str] = []
    for script, *arguments in scripts(document):
        if script == "train.py" and "ckpt=runs/latest" in arguments:
            arguments = [*previous, *arguments]  # a run goes on with what it was started with
        code, out, err = invoke(*shortened(script, arguments, cache), script=script)
        assert code == 0, f"{script} {shlex.join(arguments)}\n{out[-2000:]}\n{err[-3000:]}"
        if script == "train.py" and not {"-m", "--multirun"} & set(arguments):
            previous = [word for word in arguments if not word.startswith("ckpt=")]


@pytest.mark.readme
def test_the_first_commands_work_in_processes_of_their_own(tmp_path: Path, cache: Path) -> None:
    first: dict[str, list[str]] = {}
    for script, *arguments in scripts(ROOT / "README.md"):
        first.setdefault(script, arguments)
    assert list(first)[:3] == ["train.py", "generate.py", "evaluate.py"]
    (tmp_path / "my.txt").write_text("some words of text " * 500)
    for script, arguments in first.items():
        command = [sys.executable, str(ROOT / script), *shortened(script, arguments, cache)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.readme
@pytest.mark.parametrize(
    ("name", "code"),
    [
        (name, code)
        for name, document in zip(NAMES, DOCUMENTS, strict=True)
        for code in re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    ],
)
def test_every_example_works(name: str, code: str) -> None:
    exec(compile(code, name, "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_file_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    named = re.findall(r"`((?:performer_lm|configs|tests|benchmarks|docs)/[\w/=.]+\.\w+)`", text)
    named += re.findall(r"\]\(([\w/.-]+)\)", text)
    named += [command[1] for command in commands(document) if not command[1].startswith("-")]
    places = (ROOT, document.parent)
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert [name for name in missing if "mine" not in name] == []


def test_the_tree_of_the_readme_is_that_of_the_package() -> None:
    tree = (ROOT / "README.md").read_text().partition("\n## The tree\n")[2].partition("\n## ")[0]
    entries = {line.split()[0].rstrip("/"): line for line in tree.splitlines() if re.match(r" {6}\w", line)}
    there = {path.name for path in (ROOT / "performer_lm").iterdir() if not path.name.startswith("_")}
    assert set(entries) == there
    for name, line in entries.items():
        parts = {part for word in line.split()[1:] for part in re.findall(r"\b(\w+\.py|[a-z]\w*(?=/))", word)}
        missing = [
            part for part in parts if not any((place / part).exists() for place in (ROOT / "performer_lm" / name, ROOT))
        ]
        assert missing == [], name


def test_the_files_to_read_first_define_what_is_said_of_them() -> None:
    steps = (ROOT / "README.md").read_text().partition("\n## Read these eight files first\n")[2].partition("\n## ")[0]
    items = re.split(r"^\d\. ", steps, flags=re.M)[1:]
    assert len(items) == 8
    for item in items:
        file, *names = re.findall(r"`([^`]+)`", item)
        code = (ROOT / file).read_text()
        defined = [name.split(".")[-1] for name in names if re.fullmatch(r"[A-Za-z_.]+", name)]
        assert [name for name in defined if not re.search(rf"(def|class) {name}\b", code)] == [], file
