"""The README's commands and code, run as a user would: in order, in a folder of their own, with the real scripts."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = ["trainer.val_every=2", "data.validation_bytes=8192", "callbacks.samples.max_new_tokens=8"]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def shortened(command: str) -> list[str]:
    """Return the command with few steps; what it says itself stands, but for the length of the run."""
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    if script == "train.py":
        arguments = [argument for argument in arguments if not argument.startswith("trainer.max_steps=")]
        resumed = any(argument.startswith("ckpt=") for argument in arguments)
        arguments += [*SHORT, f"trainer.max_steps={8 if resumed else 4}"]
    if script == "generate.py" and not any(argument.startswith("max_new_tokens=") for argument in arguments):
        arguments += ["max_new_tokens=16"]
    return [sys.executable, str(ROOT / script), *arguments]


@pytest.mark.readme
def test_every_command_works_in_order(tmp_path: Path) -> None:
    words = " ".join(f"word{number * 7919 % 1000}" for number in range(20_000))
    (tmp_path / "my.txt").write_text(words)
    assert len(commands()) > 10
    previous: list[str] = []
    for command in commands():
        if "ckpt=runs/latest" in command and command.startswith("python train.py"):
            command = " ".join(["python train.py", *previous, *shlex.split(command)[2:]])
        done = subprocess.run(shortened(command), cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        if command.startswith("python train.py") and " -m " not in command:
            previous = [word for word in shlex.split(command)[2:] if not word.startswith("ckpt=")]


@pytest.mark.readme
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_every_example_works(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_every_file_the_readme_names_exists() -> None:
    named = re.findall(r"`((?:performer_lm|configs|tests|benchmarks)/[\w/]+\.\w+)`", README)
    assert [name for name in named if not (ROOT / name).exists() and "mine" not in name] == []
