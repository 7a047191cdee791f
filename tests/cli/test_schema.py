from typing import NotRequired, TypedDict, Unpack

import pytest
from omegaconf import OmegaConf

from performer_lm.annotations import Section
from performer_lm.building import parameters
from performer_lm.cli.errors import UsageError
from performer_lm.cli.schema import check

WHOLE = {"_target_": "performer_lm.sample.Whole", "dim": 4}
PART = {"_target_": "performer_lm.sample.Part", "size": 1}
SUPPLIED = {"model": ["vocab_size"]}


def problems(tree, **options):
    """Return the problems of a config, one line each."""
    try:
        check(OmegaConf.create(tree), **options)
    except UsageError as error:
        return list(error.problems)
    return []


def test_a_right_config_passes(sample):
    tree = {
        "seed": 3,
        "ckpt": None,
        "size": 8,
        "part": PART,
        "model": {
            **WHOLE,
            "heads": "${size}",
            "sizes": [1, 2],
            "rates": [0, 0.5],
            "part": "${part}",
            "parts": {"a": PART},
            "make_part": {**PART, "_partial_": True},
            "untyped": {"what": "ever"},
        },
        "callbacks": {"one": PART, "none": None, "empty": {}},
    }
    assert problems(tree, keys={"seed": int, "ckpt": str | None, "size": int}, supplied=SUPPLIED) == []


def test_all_problems_are_listed_at_once(sample):
    tree = {
        "seed": "x",
        "model": {
            **WHOLE,
            "dmi": 3,
            "heads": "two",
            "window": 1.5,
            "kind": "slwo",
            "sizes": [1, "b"],
            "part": {**PART, "sise": 3, "scale": "big"},
            "make_part": {"_target_": "performer_lm.sample.Part"},
        },
    }
    assert problems(tree, keys={"seed": int}, supplied=SUPPLIED) == [
        "seed: wanted int, got 'x' (str)",
        "model.dmi: unknown key; did you mean model.dim?",
        "model.heads: wanted int, got 'two' (str)",
        "model.window: wanted int or null, got 1.5 (float)",
        "model.kind: wanted 'fast' or 'slow', got 'slwo' (str)",
        "model.sizes[1]: wanted int, got 'b' (str)",
        "model.part.sise: unknown key; did you mean model.part.size?",
        "model.part.scale: wanted float, got 'big' (str)",
        "model.make_part.size: missing; wanted int",
    ]


def test_what_is_required_is_missed_unless_partial_or_supplied(sample):
    assert problems({"model": WHOLE}) == ["model.vocab_size: missing; wanted int"]
    assert problems({"model": WHOLE}, supplied=SUPPLIED) == []
    assert problems({"model": {**WHOLE, "_partial_": True}}) == []
    assert problems({"model": {**WHOLE, "dim": "???"}}, supplied=SUPPLIED) == [
        "model.dim: needs a value: model.dim=..."
    ]
    assert problems({"ckpt": "???"}, keys={"ckpt": str}) == ["ckpt: needs a value: ckpt=..."]


def test_what_no_target_owns_must_be_declared(sample):
    assert problems({"seed": 1, "sede": 3}, keys={"seed": int}) == ["sede: unknown key; did you mean seed?"]
    assert problems({"modle": {"dim": 3}}) == ["modle.dim: unknown key"]
    assert problems({"paths": {"out": "x"}}, keys={"paths.out": str}) == []
    assert problems({"paths": {"out": "x"}}, keys={"paths": dict}) == []
    assert problems({"extra": ["a"]}) == ["extra[0]: unknown key"]


def test_what_is_declared_must_be_there_and_is_null_where_it_may_be(sample):
    keys = {"seed": int, "ckpt": str | None, "resume.allow": list[str], "part": Section}
    assert problems({}, keys=keys) == [
        "seed: missing; wanted int",
        "resume.allow: missing; wanted a list of str",
        "part: missing; wanted a section with _target_",
    ]
    cfg = OmegaConf.create({"seed": 1, "resume": {"allow": []}, "part": PART})
    check(cfg, keys=keys)
    assert cfg.ckpt is None
    assert problems({**cfg, "part": {"size": 1}}, keys=keys) == [
        "part: wanted a section with _target_, got a section without _target_"
    ]


def test_refused_targets_are_found_wherever_they_stand(sample):
    bad = {"_target_": "os.system", "command": "true"}
    tree = {
        "seed": "os.system",
        "a": bad,
        "b": {"c": [bad]},
        "model": {**WHOLE, "untyped": [{"x": bad}], "nope": bad},
        "open": {"_target_": "performer_lm.sample.takes_anything", "first": 1, "second": bad},
        "free": bad,
        "hidden": {"_target_": "${seed}"},
        "number": {"_target_": 3},
    }
    found = problems(tree, keys={"seed": str, "free": dict}, supplied=SUPPLIED)
    keys = [line.partition(":")[0] for line in found]
    assert [key for key in keys if key.endswith("_target_")] == [
        "a._target_",
        "b.c[0]._target_",
        "model.untyped[0].x._target_",
        "model.nope._target_",
        "open.second._target_",
        "free._target_",
        "hidden._target_",
        "number._target_",
    ]


def test_a_target_behind_an_interpolation_is_checked_too(sample):
    tree = {"name": "os.system", "a": {"_target_": "${name}"}}
    assert problems(tree, keys={"name": str})[0].startswith("a._target_: 'os.system' may not be built")


def test_positional_arguments_are_refused(sample):
    assert "model._args_: unknown key" in problems({"model": {**WHOLE, "_args_": [1]}}, supplied=SUPPLIED)[0]


def test_a_wrong_value_is_told_once_where_it_stands(sample):
    tree = {"context": "long", "model": {**WHOLE, "dim": "${context}"}, "part": {**PART, "size": "s"}}
    tree["model"]["part"] = "${part}"
    assert problems(tree, keys={"context": int}, supplied=SUPPLIED) == [
        "context: wanted int, got 'long' (str)",
        "part.size: wanted int, got 's' (str)",
    ]


def test_a_reference_to_the_wrong_kind_is_told_at_the_reference(sample):
    tree = {"name": "x", "model": {**WHOLE, "dim": "${name}", "part": "${other}"}, "other": {**WHOLE, "vocab_size": 1}}
    assert problems(tree, keys={"name": str}, supplied=SUPPLIED) == [
        "model.dim: wanted int, got 'x' (str)",
        "model.part: wanted Base or null, got performer_lm.sample.Whole",
    ]


@pytest.mark.parametrize("text", ["${nope}", "${model.nope}", "${oc.env:NO_SUCH_VARIABLE}", "${no_such_resolver:1}"])
def test_an_interpolation_that_leads_nowhere_is_one_line(sample, text):
    [line] = problems({"model": {**WHOLE, "heads": text}}, supplied=SUPPLIED)
    assert line.startswith(f"model.heads: {text} does not resolve: ")
    assert "\n" not in line


def test_sections_that_hold_each_other_are_one_line(sample):
    part = {"_target_": "performer_lm.sample.Part", "size": 1, "scale": "${model}"}
    assert problems({"part": part, "model": {**WHOLE, "part": "${part}"}}, supplied=SUPPLIED) == [
        "sections that hold each other have no end: part.scale=${model}, model.part=${part}"
    ]


def test_extra_keys_pass_where_the_target_takes_any(sample):
    node = {"_target_": "performer_lm.sample.takes_anything", "first": 1, "second": "x"}
    assert problems({"a": node}) == []
    assert problems({"a": {**node, "first": "x"}}) == ["a.first: wanted int, got 'x' (str)"]


def test_torch_s_own_annotations_are_the_schema_too():
    node = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": "abc", "betas": [0.9], "weight_deacy": 0.1}
    assert problems({"optimizer": node}) == [
        "optimizer.lr: wanted float, got 'abc' (str)",
        "optimizer.betas: wanted a list of 2 (float, float), got 1",
        "optimizer.weight_deacy: unknown key; did you mean optimizer.weight_decay?",
    ]


class Common(TypedDict):
    size: int
    name: NotRequired[str]


def collect(*, path: str, **options: Unpack[Common]) -> None: ...


def test_unpacked_options_count_one_by_one():
    found = parameters(collect)
    assert {name: parameter.annotation for name, parameter in found.items()} == {"path": str, "size": int, "name": str}
    assert [name for name, parameter in found.items() if parameter.default is parameter.empty] == ["path", "size"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"windw": 3}, "a.windw: unknown key; did you mean a.window?"),
        ({"key_haeds": 3}, "a.key_haeds: unknown key; did you mean a.key_heads?"),
        ({"dropout": 1.5}, "a.dropout must be at least 0 and below 1, got 1.5"),
        ({"dropout": None}, "a.dropout: wanted float, got null"),
        ({"heads": 0}, "a.heads must be at least 1, got 0"),
    ],
)
def test_sizes_that_backends_share_are_explained_as_options_of_their_own(options, told):
    node = {"_target_": "performer_lm.attention.local.LocalAttention", "_partial_": True, "window": 4}
    assert problems({"a": {**node, **options}}) == [told]
