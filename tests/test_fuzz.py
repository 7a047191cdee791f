"""Whatever is typed trains, or is refused in clear lines and leaves nothing (RELIABILITY: C22).

Command lines are drawn over the real config tree: choices of every group, and values by the annotation of the
constructor that takes them, right ones and nonsense.
"""

import faulthandler
import functools
import json
import re
import resource
import shutil
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from performer_lm.building import parameters, resolve
from performer_lm.training.loggers import record

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = ["debug=fast", "trainer.max_steps=2", "run_dir=runs/a"]
SMALL_PARTS = {  # by the group that has them
    "data": ["data=files", "data.path=text.txt", "data.context=32", "data.validation_bytes=2048"],
    "tokenizer": ["tokenizer=bytes"],
    "callbacks": ["callbacks.samples.max_new_tokens=4"],
    "model": ["model.dim=16"],
}
LEFT_OUT = {
    "sweep": "needs -m",
    "debug": "one is chosen already",
    "data/corpus": "of mixtures",
    "data/task": "of synthetic",
}
TOO_LONG = {("logger", "wandb"), ("data", "stdlib"), ("data", "mixture"), ("data", "hf")}  # seconds each
MORE = {"data=files": "data.path=text.txt"}  # what a choice needs besides
FEW = {  # what a user may well want and a test has no time for, or this machine no room
    "trainer.max_steps": st.sampled_from(["-1", "0", "1", "2", "3"]),
    "trainer.devices": st.sampled_from(["-1", "0", "1", "auto"]),
    "trainer.num_nodes": st.sampled_from(["-1", "0", "1"]),
    "callbacks.samples.max_new_tokens": st.sampled_from(["-1", "0", "1", "2"]),
    "model.depth": st.sampled_from(["-1", "0", "1", "2", "3"]),
    "data.num_workers": st.sampled_from(["-1", "0"]),
    "data.tokenizing_threads": st.sampled_from(["-1", "0", "1", "2", "null"]),
    "compile": st.just("false"),
    "data.cache_dir": st.just("data/cache"),
}
INTS = ["0", "1", "2", "3", "4", "5", "7", "8", "33", "64", "-1", "1000000000", "4294967296", "1000000000000000000000"]
INTS += ["9223372036854775807", "9223372036854775808", "-9223372036854775809"]
FLOATS = ["0", "0.0", "0.1", "0.5", "0.9", "0.999", "1.0", "1.5", "-1.0", "1e-30", "1e-320", "1e39", "1e300"]
FLOATS += ["inf", "-inf", "nan", "-0.0", "9223372036854775808"]
WORDS = ["auto", "default", "cpu", "gpu", "none", "32-true", "bf16-mixed", "16-mixed", "relu", "gelu", "iid", "stream"]
NONSENSE = ["abc", "''", "null", "true", "[]", "[1]", "[[1,2],3]", "{}", "{a:1}", "1", "-3", "0.5", "1e400", "nan"]
NONSENSE += ["???", "${data.context}", "${nope}", "${model}", "'${'", "${now:}", "ä ö", "'a\\nb'", "'  '", "x" * 300]
PYTHON = (
    r"<class|<function|object at 0x|Traceback|NoneType|unexpected keyword|positional argument|not supported between|"
    r"unsupported operand|has no attribute|not callable|cannot be interpreted|out of range$|math domain"
)
Invoke = Callable[..., tuple[int, str, str]]


@functools.cache
def choices() -> dict[str, list[str]]:
    """Return the names of every group that a test has time for."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        group, name = str(path.parent.relative_to(CONFIGS)), path.stem
        if group not in (".", *LEFT_OUT) and not name.startswith("_") and (group, name) not in TOO_LONG:
            found.setdefault(group, []).append(name)
    return found


def spelled(wanted: Any) -> st.SearchStrategy[str]:
    """Return spellings of values that fit an annotation, more or less."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        return spelled(args[0])
    if origin in (typing.Union, types.UnionType):
        return st.one_of([spelled(arm) for arm in args])
    if origin is typing.Literal:
        return st.sampled_from([str(arm) for arm in args])
    if origin in (list, tuple):
        return st.lists(spelled(args[0]), max_size=3).map(lambda items: f"[{','.join(items)}]")
    if wanted in (None, type(None)):
        return st.just("null")
    plain = {bool: ["true", "false"], int: INTS, float: FLOATS, str: WORDS}
    return st.sampled_from(plain.get(wanted, NONSENSE))


@functools.cache
def leaves(*chosen: str) -> dict[str, Any]:
    """Return the keys of a config by name, with the annotations of what they are given to."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("train", overrides=base(chosen)), resolve=False)
    own = {"seed": int, "ckpt": str | None, "run_dir": str, "compile": bool, "resume.allow": list[str]}
    own |= dict.fromkeys(("model", "optimizer", "trainer", "callbacks", "logger", "callbacks.x", "resume"), dict)
    return own | dict(_leaves(cfg, ""))


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        return
    wanted = parameters(resolve(node["_target_"])) if "_target_" in node else {}
    for name, value in node.items():
        inside = f"{key}.{name}" if key else str(name)
        if name in wanted:
            yield inside, wanted[name].annotation
        yield from _leaves(value, inside)


def base(words: Sequence[str]) -> list[str]:
    """Return a command line that trains two steps in a second, with what `words` choose in its place."""
    groups = {word.partition("=")[0] for word in words}
    return [*SMALL, *(word for group, part in SMALL_PARTS.items() if group not in groups for word in part), *words]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Draw a few choices and a few values."""
    groups = draw(st.lists(st.sampled_from(sorted(choices())), max_size=3, unique=True))
    chosen = [f"{group}={draw(st.sampled_from(choices()[group]))}" for group in groups]
    chosen += [more for choice, more in MORE.items() if choice in chosen]
    try:
        found = leaves(*chosen)
    except Exception:  # as wrong as what is drawn below
        found = leaves()
    keys = draw(st.lists(st.sampled_from(sorted(found)), max_size=3, unique=True))
    values = []
    for key in keys:
        fit = FEW.get(key, spelled(found[key]))
        given = st.one_of(*[fit] * 9, st.sampled_from(NONSENSE)).map(f"{key}={{}}".format)
        values.append(draw(st.one_of(*[given] * 9, st.just(f"~{key}"))))
    return chosen + values


@pytest.fixture
def attempt(invoke: Invoke, text: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], str]]:
    """Return a function that runs a command line in a clean folder, and tells what is wrong with its ending."""
    monkeypatch.setattr(record, "draw_metrics", lambda *arguments, **options: None)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**33, limits[1]))  # what is too large is refused here, not killed

    def run(words: list[str]) -> str:
        before = set(Path().iterdir())
        faulthandler.dump_traceback_later(120, exit=True)
        code, out, err = invoke(*base(words))
        faulthandler.cancel_dump_traceback_later()
        event(f"exit code {code}")
        left = set(Path().iterdir()) - before - {Path("data")}
        problem = judge(code, out, err, left)
        for path in left:
            shutil.rmtree(path)
        return problem and f"{problem}\n{' '.join(words)}\n{code}\n{out[-1000:]}\n{err[-6000:]}"

    yield run
    resource.setrlimit(resource.RLIMIT_AS, limits)


def judge(code: int, out: str, err: str, left: set[Path]) -> str:
    """Return what is wrong with an ending; nothing, if it is one of those that are promised."""
    told = [line for line in err.splitlines() if not line.startswith("data: ")]  # the progress of tokenizing
    if code == 0:
        summaries = [summary for folder in left for summary in folder.rglob("summary.json")]
        steps = [json.loads(summary.read_text())["steps"] for summary in summaries]
        return "" if not told and len(steps) == 1 and 0 < steps[0] <= 3 else f"{steps} steps"
    if code == 4:
        return "" if told[0].startswith("error: out of memory: ") else "not told"
    if code not in (2, 3):
        return f"code {code}"
    problems = [line.removeprefix("error: ") for line in told]
    if not told or not all(line.startswith("error: ") for line in told):
        return "not one line a problem"
    if len(set(problems)) < len(problems):
        return "told twice"
    if code == 2 and (out or left):
        return f"leaves {left} and says {out!r}"
    if unclear := [line for line in problems if re.search(PYTHON, line)]:
        return f"unclear: {unclear}"
    if long := [line for line in problems if len(line) > 900]:
        return f"long: {long}"
    return ""


drawn = settings(
    max_examples=8,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a line is short as it is
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(command_lines())
@drawn
def test_what_is_typed_trains_or_is_refused(attempt: Callable[[list[str]], str], words: list[str]) -> None:
    problem = attempt(words)
    assert not problem, problem


@pytest.mark.slow
@given(command_lines())
@settings(drawn, max_examples=200)
def test_whatever_is_typed_trains_or_is_refused(attempt: Callable[[list[str]], str], words: list[str]) -> None:
    problem = attempt(words)
    assert not problem, problem
