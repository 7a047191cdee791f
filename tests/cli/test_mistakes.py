import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals

from performer_lm.cli.compose import Composer


def mistakes(tree, *overrides, multirun=False, config_name="train"):
    """Return what is wrong with the overrides, one line each."""
    setup_globals()
    return Composer(config_name=config_name, config_path=str(tree)).compose(overrides, multirun=multirun).problems


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("attn=falsh", "attn=falsh: no such choice; did you mean attn=flash? (choices: exact, favor, flash)"),
        ("attn=7", "attn=7: no such choice (choices: exact, favor, flash)"),
        ("attn=null", "attn=null: no such choice (choices: exact, favor, flash)"),
        ("+attn=zz", "+attn=zz: no such choice (choices: exact, favor, flash)"),
        ("optimizer.rl=1", "optimizer.rl: unknown key; did you mean optimizer.lr?"),
        ("lr=1", "lr: unknown key; did you mean model.lr?"),
        ("modle=small", "modle: unknown key; did you mean model?"),
        ("modle.lr=1", "modle.lr: unknown key; did you mean model.lr?"),
        ("sed=1", "sed: unknown key; did you mean seed?"),
        (
            "optimizer.weight_decay=1",
            "optimizer.weight_decay: not set in the config; to add it write +optimizer.weight_decay=...",
        ),
        ("optimizer.lr.x=1", "optimizer.lr.x: unknown key"),
        ("hydra.run.dri=x", "hydra.run.dri: unknown key; did you mean hydra.run.dir?"),
        ("+seed=1", "+seed=1: seed is in the config already; write seed=1"),
        ("~sede", "~sede: unknown key; did you mean seed?"),
        ("flash", "flash: wanted key=value"),
        (
            "a=[1",
            "a=[1: not a valid override (no viable alternative at input '[1'); to give it as text write \"a='[1'\"",
        ),
        ("attn=flash,exact", "attn=flash,exact: several values need -m (or --multirun)"),
        ("seed=range(3)", "seed=range(3): several values need -m (or --multirun)"),
    ],
)
def test_each_mistake_is_one_line_with_the_nearest_name(tree, override, problem):
    if override == "lr=1":  # one key of that name, or no guess
        (tree / "optimizer" / "adamw.yaml").write_text(
            "{_target_: torch.optim.AdamW, _partial_: true, betas: [0.9, 0.95]}"
        )
        (tree / "model" / "small.yaml").write_text("{_target_: torch.optim.Adam, _partial_: true, lr: 1.0}")
        (tree / "train.yaml").write_text((tree / "train.yaml").read_text().replace(", lr: 1.0", ""))
    assert mistakes(tree, override) == [problem]


def test_all_mistakes_are_listed(tree):
    assert mistakes(tree, "attn=falsh", "model=smal", "seed=3", "x=[") == [
        "x=[: not a valid override (no viable alternative at input '['); to give it as text write \"x='['\"",
        "attn=falsh: no such choice; did you mean attn=flash? (choices: exact, favor, flash)",
        "model=smal: no such choice; did you mean model=small? (choices: small)",
    ]


def test_what_hydra_itself_refuses_is_named_too(tree):
    sede, number = mistakes(tree, "sede=1", "hydra.job.num=abc", "seed=3")
    assert sede.startswith("sede: unknown key")
    assert number.startswith("hydra.job.num=abc: ")
    assert "could not be converted to Integer" in number


def test_after_wrong_keys_the_rest_is_still_composed(tree):
    setup_globals()
    composed = Composer(config_name="train", config_path=str(tree)).compose(["sede=1", "seed=5"], multirun=False)
    assert composed.problems == ["sede: unknown key; did you mean seed?"]
    assert [job.seed for job in composed.jobs] == [5]


def test_a_choice_wrong_anywhere_in_a_sweep_is_found_before_it_starts(tree):
    [line] = mistakes(tree, "attn=flash,falsh", multirun=True)
    assert line.startswith("attn=falsh: no such choice; did you mean attn=flash?")
    [line] = mistakes(tree, "attn=flash,exact", "sede=1,2", multirun=True)
    assert line == "sede: unknown key; did you mean seed?"
    [line] = mistakes(tree, "+hydra.sweeper.params.seed='1,2'", multirun=True)
    assert line.startswith("+hydra.sweeper.params.seed='1,2': ")
    assert "INTERVAL_SWEEP" in mistakes(tree, "seed=interval(0,1)", multirun=True)[0]


def test_a_wrong_config_name_gets_the_nearest(tree):
    [line] = mistakes(tree, config_name="trian")
    assert line == "--config-name=trian: no such choice; did you mean --config-name=train? (choices: train)"


@pytest.mark.parametrize(
    ("text", "words"),
    [("defaults: [{model: gone}]\n", "model/gone"), ("a: [1\n", "train.yaml"), ("seed: ${\n", "${")],
)
def test_a_broken_config_file_is_one_line(tree, text, words):
    (tree / "train.yaml").write_text(text)
    [line] = mistakes(tree)
    assert words in line
    assert "\n" not in line


@pytest.fixture
def parts(tree):
    """Let attn=favor choose features, as attn=flash does not."""
    (tree / "attn" / "features").mkdir()
    (tree / "attn" / "features" / "positive.yaml").write_text("a: 1\n")
    (tree / "attn" / "favor.yaml").write_text("defaults: [features: positive]\nmomentum: 0.1\n")
    return tree


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["attn=flash", "attn/features=positive"],
            "attn/features=positive: attn=flash has no attn/features to choose; with one: attn=favor",
        ),
        (["attn.features=positive"], "choices are made with a slash; did you mean attn/features=positive?"),
        (["attn.features=positiv"], "attn/features=positiv: no such choice; did you mean attn/features=positive?"),
        (["seed='${'"], "`${` begins an interpolation, and this one does not end well"),
    ],
)
def test_a_choice_in_the_wrong_place_or_way_is_told(parts, overrides, problem):
    [line] = mistakes(parts, *overrides)
    assert problem in line


@pytest.mark.parametrize("override", ["a=[1", "a=it's [", "a=$["])
def test_what_is_advised_for_text_gives_it(tree, override):
    [line] = mistakes(tree, override)
    [typed] = shlex.split(line.rpartition("write ")[2])
    assert OverridesParser.create().parse_override(typed).value() == override.partition("=")[2]
