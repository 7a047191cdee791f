import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from performer_lm.cli.compose import compose
from performer_lm.cli.errors import UsageError
from performer_lm.cli.hydra_section import check_overrides
from performer_lm.cli.loading import Loader
from performer_lm.cli.mistakes import explaining, meant_as_choices


def mistakes(tree, *overrides, multirun=False, config_name="train"):
    """Return what is wrong with the overrides, one line each."""
    try:
        loader = Loader(config_name=config_name, config_path=tree)
        with explaining(loader, overrides, multirun=multirun):
            check_overrides(loader.parse(overrides))
            compose(loader, overrides, multirun=multirun)
    except UsageError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("attn=falsh", "attn=falsh: no such choice; did you mean attn=flash? (choices: exact, favor, flash)"),
        ("attn=7", "attn=7: no such choice (choices: exact, favor, flash)"),
        ("attn=null", "attn=null: no such choice (choices: exact, favor, flash)"),
        ("attn=[7]", "attn=7: no such choice (choices: exact, favor, flash)"),
        ("attn=[favor,[7,true]]", "attn=7: no such choice (choices: exact, favor, flash)"),
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
        (
            "hydra.run.dri=x",
            "hydra.run.dri: not for users to set (allowed: hydra.launcher, "
            "hydra.sweeper, hydra.mode, hydra.run.dir, hydra.sweep.dir, hydra.verbose)",
        ),
        ("hydra.launcher.n_job=2", "hydra.launcher.n_job: unknown key"),
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


def test_of_several_mistakes_the_first_is_told_and_choices_come_before_keys(tree):
    assert mistakes(tree, "optimizer.rl=1", "attn=falsh", "model=smal", "seed=3") == [
        "attn=falsh: no such choice; did you mean attn=flash? (choices: exact, favor, flash)"
    ]
    assert mistakes(tree, "attn=falsh", "x=[") == [
        "x=[: not a valid override (no viable alternative at input '['); to give it as text write \"x='['\""
    ]
    assert mistakes(tree, "seed=3", "sede=1", "optimizer.rl=1") == ["sede: unknown key; did you mean seed?"]


def test_what_hydra_itself_refuses_is_named_too(tree):
    [line] = mistakes(tree, "seed=3", "hydra.mode=abc")
    assert line.startswith("hydra.mode=abc: ")
    assert "Invalid value 'abc', expected one of [RUN, MULTIRUN]" in line


def test_a_choice_wrong_anywhere_in_a_sweep_is_found_before_it_starts(tree):
    [line] = mistakes(tree, "attn=flash,falsh", multirun=True)
    assert line.startswith("attn=falsh: no such choice; did you mean attn=flash?")
    [line] = mistakes(tree, "attn=flash,exact", "sede=1,2", multirun=True)
    assert line == "sede: unknown key; did you mean seed?"
    [line] = mistakes(tree, "+hydra.sweeper.params.seed='1,2'", multirun=True)
    assert line.startswith("+hydra.sweeper.params.seed='1,2': ")
    [line] = mistakes(tree, "seed=interval(0,1)", multirun=True)
    assert line == "seed=interval(0,1): intervals need a sweeper that samples them: hydra/sweeper=optuna"


def test_a_wrong_config_name_gets_the_nearest(tree):
    [line] = mistakes(tree, config_name="trian")
    assert line == "--config-name=trian: no such choice; did you mean --config-name=train? (choices: train)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defaults: [{model: gone}]\n", "model/gone"),
        ("defaults: [train]\n", "have no end"),
        ("a: [1\n", "train.yaml"),
        ("seed: ${\n", "${"),
    ],
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
        (["seed='${'"], "`${` begins an interpolation, and this one does not end well"),
    ],
)
def test_a_choice_in_the_wrong_place_or_way_is_told(parts, overrides, problem):
    [line] = mistakes(parts, *overrides)
    assert problem in line


def test_a_choice_made_as_a_value_is_told(parts):
    loader = Loader(config_name="train", config_path=parts)
    typed = ["seed=1", "attn.features=positive", "attn.features=positiv", "optimizer.lr=3"]
    assert meant_as_choices(loader, typed) == [
        "attn.features=positive: choices are made with a slash; did you mean attn/features=positive?",
        "attn/features=positiv: no such choice; did you mean attn/features=positive? (choices: positive)",
    ]


@pytest.mark.parametrize("override", ["a=[1", "a=it's [", "a=$["])
def test_what_is_advised_for_text_gives_it(tree, override):
    [line] = mistakes(tree, override)
    [typed] = shlex.split(line.rpartition("write ")[2])
    assert OverridesParser.create().parse_override(typed).value() == override.partition("=")[2]
