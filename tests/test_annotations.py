from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pytest
from annotated_types import Ge, Gt, Le

from performer_lm.annotations import Section, describe, leaves, mismatches

PART = {"_target_": "performer_lm.sample.Part", "size": 1}
MAKE_PART = {**PART, "_partial_": True}
WHOLE = {"_target_": "performer_lm.sample.Whole"}


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        (int, 3),
        (float, 3),
        (bool, True),
        (str, ""),
        (Path, "a/b"),
        (None, None),
        (int | None, None),
        (int | str, "x"),
        (Literal["a", 1], 1),
        (list, [1, "a"]),
        (list[int], []),
        (Sequence[float], [1, 2.5]),
        (tuple[int, str], [1, "a"]),
        (tuple[int, ...], [1, 2, 3]),
        (dict, {"a": 1}),
        (dict[str, int], {"a": 1}),
        (Mapping[str, list[int]], {"a": [1]}),
        (Annotated[int, "metres"], 3),
        (Annotated[int, Ge(3)], 3),
        (Annotated[float, Gt(0)] | None, 1),
        (Annotated[int, Ge(0)] | Annotated[float, Le(1)], 2),
        (list[Annotated[int, Ge(1)]], [1, 2]),
        (Any, object()),
        (TypeVar("T"), "anything"),
        ("NotEvaluated", 3),
    ],
)
def test_a_value_that_fits(wanted, value):
    assert list(mismatches(wanted, value, "key")) == []


@pytest.mark.parametrize(
    ("wanted", "value", "where", "problem"),
    [
        (int, "abc", "key", "wanted int, got 'abc' (str)"),
        (int, 3.0, "key", "wanted int, got 3.0 (float)"),
        (int, True, "key", "wanted int, got True (bool)"),
        (float, False, "key", "wanted float, got False (bool)"),
        (bool, 1, "key", "wanted bool, got 1 (int)"),
        (str, 12, "key", "wanted str, got 12 (int); for text write '\"12\"'"),
        (str, None, "key", "wanted str, got null"),
        (int | None, "a", "key", "wanted int or null, got 'a' (str)"),
        (Literal["fast", "slow"], "slwo", "key", "wanted 'fast' or 'slow', got 'slwo' (str)"),
        (Literal[1], True, "key", "wanted 1, got True (bool)"),
        (list[int], 3, "key", "wanted a list of int, got 3 (int)"),
        (list[int], [1, "a"], "key[1]", "wanted int, got 'a' (str)"),
        (list[int] | None, [1, "a"], "key[1]", "wanted int, got 'a' (str)"),
        (tuple[float, float], [1], "key", "wanted a list of 2 (float, float), got 1"),
        (tuple[float, float], [1, "a"], "key[1]", "wanted float, got 'a' (str)"),
        (dict[str, int], {"a": "b"}, "key.a", "wanted int, got 'b' (str)"),
        (dict[str, int], [1], "key", "wanted a section of int, got [1] (list)"),
        (Annotated[int, Ge(1)], 0, "key", "must be at least 1, got 0"),
        (Annotated[int, Ge(1)], "a", "key", "wanted int, got 'a' (str)"),
        (Annotated[int, Ge(1)] | None, 0, "key", "must be at least 1, got 0"),
        (Annotated[float, Gt(0), Le(1)], 2, "key", "must be above 0 and at most 1, got 2"),
        (Annotated[int, Ge(0)] | Annotated[float, Le(1)], 1.5, "key", "must be at most 1, got 1.5"),
        (list[Annotated[int, Ge(1)]] | None, [1, 0], "key[1]", "must be at least 1, got 0"),
        (float, float("nan"), "key", "must be a finite number, got nan"),
        (dict[str, float], {"a": float("inf")}, "key.a", "must be a finite number, got inf"),
        (int | None, 2**63, "key", "must be within 64 bits (at most 9223372036854775807), got 2^63 or more"),
        (float, -(10**40), "key", "must be within 64 bits (at most 9223372036854775807), got -2^132 or more"),
        (int, {"a": 1}, "key", "wanted int, got a section without _target_"),
        (int, PART, "key", "wanted int, got performer_lm.sample.Part"),
        (Literal["fast", "slow"], PART, "key", "wanted 'fast' or 'slow', got performer_lm.sample.Part"),
    ],
)
def test_a_value_that_does_not_fit(sample, wanted, value, where, problem):
    assert list(mismatches(wanted, value, "key")) == [(where, problem)]


def test_sections_that_build_something_fit_what_they_build(sample):
    for wanted, value in [
        (sample.Base, PART),
        (sample.Part | None, PART),
        (list[sample.Base], [PART, PART]),
        (dict[str, sample.Base], {"a": PART}),
        (Callable[..., sample.Base], MAKE_PART),
        (Callable, MAKE_PART),
        (dict[str, Callable[..., sample.Base]], {"a": MAKE_PART}),
        (Section, PART),
        (dict[str, Section | None], {"a": PART, "b": None}),
        (sample.Base, {"_target_": "os.system"}),  # refused where it stands, not here
    ]:
        assert list(mismatches(wanted, value, "key")) == []


def test_sections_that_build_something_else_do_not(sample):
    for wanted, value, problem in [
        (sample.Base, WHOLE, "wanted Base, got performer_lm.sample.Whole"),
        (sample.Base, MAKE_PART, "wanted Base, got a factory of performer_lm.sample.Part"),
        (sample.Base, "part", "wanted Base, got 'part' (str)"),
        (Callable[..., sample.Base], {**WHOLE, "_partial_": True}, "got a factory of performer_lm.sample.Whole"),
        (Section, MAKE_PART, "wanted a section with _target_, got a factory of performer_lm.sample.Part"),
        (Section, {}, "wanted a section with _target_, got a section without _target_"),
        (Callable[..., sample.Base], "gelu", "wanted a factory (a section with _target_ and _partial_: true)"),
    ]:
        [(where, found)] = mismatches(wanted, value, "key")
        assert where == "key"
        assert problem in found


def test_types_are_spelled_in_a_user_s_words(sample):
    import torch

    assert describe(float | torch.Tensor) == "float"  # a config cannot spell a tensor
    assert describe(int | str | None) == "int or str or null"
    assert describe(Sequence[float]) == "a list of float"
    assert describe(Path) == "a path"
    assert describe(sample.Base) == "Base"


def test_leaves_are_named_as_a_user_names_them():
    tree = {"a": {"b": 1, "c": [2, {"d": None}], "e": {}}, "f": []}
    assert list(leaves(tree, "")) == [("a.b", 1), ("a.c[0]", 2), ("a.c[1].d", None), ("a.e", {}), ("f", [])]
