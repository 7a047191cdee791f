"""The guides of docs/extending.md, followed as they stand: each in a copy of the project, in the order of its blocks.

A block with a title is a file: it is written, added to the end of one that is there, or, as a diff, applied to it line
by line. The commands of ```bash blocks run shortened, in one process for each guide.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = re.findall(r"^## (Add an? .*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/extending.md").read_text(), re.M | re.S)
BLOCK = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^\1```$', re.M | re.S)
TITLED = [(title, guide) for title, guide in GUIDES if "```" in guide]
SHORT = {
    "train.py": [
        *("trainer.max_steps=2", "trainer.val_every=2", "data.validation_bytes=4096", "data.context=64"),
        *("data.batch_size=2", "tokenizer=bytes", "callbacks=[]", "model.dim=64", "model.depth=1", "model.heads=2"),
    ],
    "evaluate.py": [],
    "generate.py": ["max_new_tokens=4"],
}
RUN = """
import json, runpy, sys
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ending:
        if ending.code:
            sys.exit(f"{' '.join(sys.argv)} ended with {ending.code}")
import performer_lm
print(performer_lm.__file__)
"""


class Block(NamedTuple):
    """A fenced block of a guide."""

    language: str
    title: str
    text: str


def blocks(guide: str) -> list[Block]:
    return [Block(found[2], found[3] or "", textwrap.dedent(found[4])) for found in BLOCK.finditer(guide)]


def follow(block: Block, project: Path) -> None:
    """Do what a titled block says."""
    path = project / block.title
    if block.language == "diff":
        before = path.read_text()
        lines = [(line[0], line[1:]) for line in block.text.splitlines()]
        old, new = ([line for sign, line in lines if sign == wanted] for wanted in "-+")
        for one, other in zip(old, new, strict=True):
            assert before.count(f"{one}\n") == 1, f"{block.title} has no line {one!r}"
            before = before.replace(f"{one}\n", f"{other}\n")
        path.write_text(before)
    else:
        there = path.read_text() + "\n\n" if path.exists() else ""
        path.write_text(there + block.text)


def commands(guide: str, project: Path) -> list[list[str]]:
    """Return the commands of a guide, shortened; one that opens a run has a run to open."""
    lines = [line for block in blocks(guide) if block.language == "bash" for line in block.text.splitlines()]
    words = [shlex.split(line)[1:] for line in lines]
    if words[0][0] != "train.py":
        words.insert(0, ["train.py"])
    topics = [] if any(word.startswith("data=") for word in words[0]) else ["data=files", "data.path=my.txt"]
    more = {"train.py": topics}
    return [[str(project / script), *more.get(script, []), *SHORT[script], *given] for script, *given in words]


@pytest.mark.readme
@pytest.mark.parametrize(("title", "guide"), TITLED, ids=[title for title, _ in TITLED])
def test_every_guide_can_be_followed(title: str, guide: str, tmp_path: Path) -> None:
    project, work = tmp_path / "project", tmp_path / "work"
    work.mkdir()
    for name in ("performer_lm", "configs"):
        shutil.copytree(ROOT / name, project / name, symlinks=True)
    for script in SHORT:
        shutil.copy(ROOT / script, project)
    for block in blocks(guide):
        if block.title:
            follow(block, project)
    (work / "my.txt").write_text(" ".join(f"word{number * 7919 % 1000}" for number in range(4_000)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, json.dumps(commands(guide, project))],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.splitlines()[-1] == str(project / "performer_lm/__init__.py")


@pytest.mark.parametrize(("title", "guide"), TITLED, ids=[title for title, _ in TITLED])
def test_every_guide_has_three_steps_and_whole_files(title: str, guide: str) -> None:
    assert re.findall(r"^(\d)\. ", guide, re.M) == ["1", "2", "3"]
    titled = [block for block in blocks(guide) if block.title]
    assert {block.language for block in titled} >= {"python", "yaml"}
    for block in titled:
        if block.language == "python":
            compile(block.text, block.title, "exec")
        assert all(len(line) <= 120 for line in block.text.splitlines()), block.title
