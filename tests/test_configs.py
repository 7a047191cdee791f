"""Every file of configs/ and every value in it: what has a range declares it, and what is odd is told in lines."""

import copy
import functools
import itertools
import runpy
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import pytest
import yaml
from omegaconf import OmegaConf

from performer_lm.annotations import leaves
from performer_lm.building import parameters, resolve
from performer_lm.cli.compose import compose, task_config
from performer_lm.cli.errors import UsageError
from performer_lm.cli.loading import Loader
from performer_lm.cli.schema import check

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ANY_NUMBER = {"seed"}  # of 64 bits
FROM_CALLERS = {"heads", "key_heads", "dim_head", "dim_value", "layer", "dim", "steps"}  # never from a config
ODD = [None, {}, [], "", "x", -1, 0, 2**64, -(10**40), 0.5, float("nan"), float("inf"), True, [1], {"a": 1}]
COMMAND_LINES = {
    "train": [],
    "train with everything": [
        "attn=hybrid",
        "model=performer_seq2seq",
        "objective=seq2seq",
        "logger=[wandb,tensorboard]",
    ],
    "train with masks": ["data=mixture", "objective=mlm", "model=performer_encoder", "optimizer=adamw", "schedule=wsd"],
    "train a task": ["data=synthetic", "attn=relu", "model/absolute=axial", "model/positions=rotary"],
    "generate": [],
    "serve": ["attn=flash"],
    "convert": [],
    "evaluate": ["task=approximation", "attn=local"],
    "evaluate backends": ["task=backends"],
    "evaluate copying": ["task=copying"],
    "evaluate recall": ["task=recall"],
    "export": [],
}


def sections(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield from ([node] if "_target_" in node else [])
        for value in node.values():
            yield from sections(value)


TARGETS = sorted(
    {part["_target_"] for path in CONFIGS.rglob("*.yaml") for part in sections(yaml.safe_load(path.read_text()))}
)


def numbers_without_range(wanted: Any) -> bool:
    """Return True for an annotation that takes numbers of any size."""
    if typing.get_origin(wanted) is Annotated:
        return False
    if typing.get_origin(wanted) in (typing.Union, types.UnionType, list, tuple, dict):
        return any(map(numbers_without_range, typing.get_args(wanted)))
    return wanted in (int, float)


@pytest.mark.parametrize("target", TARGETS)
def test_every_number_that_a_config_may_set_declares_its_range(target: str) -> None:
    found = {name: each.annotation for name, each in parameters(resolve(target)).items()}
    open_ended = {name for name, wanted in found.items() if numbers_without_range(wanted)}
    assert open_ended <= ANY_NUMBER | FROM_CALLERS


@functools.cache
def entry(name: str) -> tuple[Any, Callable[[Any], None]]:
    """Return the config of an entry point with some choices, and the check that the entry point makes."""
    script, arguments = name.split()[0], {}
    with patch("performer_lm.cli.main", lambda task, **options: arguments.update(options)):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    loader = Loader(config_name=script, config_path=CONFIGS)
    [job] = compose(loader, COMMAND_LINES[name], multirun=False)
    return task_config(job), functools.partial(check, keys=arguments["keys"], supplied=arguments.get("supplied"))


def is_told(cfg: Any, check_: Callable[[Any], None]) -> bool:
    """Return True for a config that is refused, False for one that passes.

    Raises:
        AssertionError: for a refusal that is not in clear lines; any other error is one of ours.
    """
    try:
        check_(cfg)
    except UsageError as error:
        problems = error.problems
    else:
        return False
    unclear = [line for line in problems if "\n" in line or " object at 0x" in line or len(line) > 600]
    assert problems
    assert not unclear
    return True


def places(cfg: Any) -> list[str]:
    """Return all keys of a config, of sections and of values."""
    values = [key for key, _ in leaves(OmegaConf.to_container(cfg, resolve=False), "")]
    return sorted({".".join(key.split(".")[:end]) for key in values for end in range(1, key.count(".") + 2)})


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_a_config_as_it_is_passes(name: str) -> None:
    cfg, check_ = entry(name)
    assert not is_told(copy.deepcopy(cfg), check_)


SOME_OR_ALL = [(name, 20) for name in COMMAND_LINES]
SOME_OR_ALL += [pytest.param(name, 1, marks=pytest.mark.slow) for name in COMMAND_LINES]


@pytest.mark.parametrize(("name", "every"), SOME_OR_ALL)
def test_a_key_that_is_taken_out_is_told_or_not_needed(name: str, every: int) -> None:
    cfg, check_ = entry(name)
    for key in places(cfg)[::every]:
        less = copy.deepcopy(cfg)
        section, _, last = key.rpartition(".")
        OmegaConf.set_struct(less, False)
        if "[" not in key:
            del (OmegaConf.select(less, section) if section else less)[last]
            is_told(less, check_)


@pytest.mark.parametrize(("name", "every"), SOME_OR_ALL)
def test_a_value_replaced_by_anything_is_told_or_taken(name: str, every: int) -> None:
    cfg, check_ = entry(name)
    for index, (key, value) in enumerate(itertools.product(places(cfg), ODD)):
        if index % (every * len(ODD) // 2 + 1):
            continue
        changed = copy.deepcopy(cfg)
        OmegaConf.set_struct(changed, False)
        OmegaConf.update(changed, key, value, merge=False)
        refused = is_told(changed, check_)
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        assert refused or not (is_number and (value != value or abs(value) > 2**63)), (key, value)
