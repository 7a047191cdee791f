import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from performer_lm.cli.argv import parse, quote
from performer_lm.cli.compose import Composer
from performer_lm.cli.errors import UsageError

texts = st.text(
    st.one_of(st.sampled_from("\\$?{}'\"[](),=:#% \n\t~+@"), st.characters(exclude_characters="\0")), max_size=12
)


@given(texts)
def test_quoting_is_one_override_whatever_the_text(text):
    override = OverridesParser.create().parse_override(quote(f"prompt={text}", free_text=["prompt"]))
    assert override.key_or_group == "prompt"
    assert not override.is_sweep_override()


@pytest.mark.parametrize("multirun", [False, True])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=texts)
@example(text="")
@example(text="def main(")
@example(text="???")
@example(text="null")
@example(text="a,b=c d")
@example(text="${seed} \\${seed} \\\\${seed} $${")
@example(text='it\'s "quoted" \\')
@example(text="\udc80")  # a byte of argv that was no UTF-8
def test_free_text_arrives_exactly_as_typed(tree, multirun, text):
    setup_globals()
    args, _ = parse(
        [f"prompt={text}", f"ckpt=runs/a,{text}", "seed=1,2" if multirun else "seed=1"], free_text=["prompt", "ckpt"]
    )
    composed = Composer(config_name="train", config_path=str(tree)).compose(args.overrides, multirun=multirun)
    assert composed.problems == []
    assert [job.seed for job in composed.jobs] == ([1, 2] if multirun else [1])
    assert all(job.prompt == text and job.ckpt == f"runs/a,{text}" for job in composed.jobs)


def test_other_keys_are_hydra_s():
    assert quote("seed=1,2", free_text=["prompt"]) == "seed=1,2"
    assert quote("prompt", free_text=["prompt"]) == "prompt"
    assert quote("+prompt=a b", free_text=["prompt"]) == "+prompt='a b'"


def test_options_and_overrides_mix_in_any_order():
    args, _ = parse(["seed=1", "-m", "attn=flash", "--config-dir", "here"], free_text=[])
    assert args.overrides == ["seed=1", "attn=flash"]
    assert args.multirun
    assert args.config_dir == "here"


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--multrun"], "--multrun: no such option; did you mean --multirun?"),
        (["--cfg", "jobs"], "argument --cfg/-c: invalid choice: 'jobs'"),
        (["--config-dir"], "argument --config-dir/-cd: expected one argument"),
        (["--experimental-rerun", "x.pickle"], "--experimental-rerun: refused"),
    ],
)
def test_a_wrong_option_is_one_line(argv, problem):
    with pytest.raises(UsageError, match=problem.replace("?", r"\?")) as raised:
        parse(argv, free_text=[])
    assert len(raised.value.problems) == 1
