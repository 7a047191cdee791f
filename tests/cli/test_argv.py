import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from performer_lm.cli.argv import as_typed, expand_home, parse, quote
from performer_lm.cli.compose import compose
from performer_lm.cli.errors import UsageError
from performer_lm.cli.loading import Loader

texts = st.text(
    st.one_of(st.sampled_from("\\$?{}'\"[](),=:#% \n\t~+@"), st.characters(exclude_characters="\0")), max_size=12
)


@given(texts)
def test_quoting_is_one_override_whatever_the_text(text):
    override = OverridesParser.create().parse_override(quote(f"prompt={text}"))
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
    args, _ = parse([f"prompt={text}", f"ckpt=runs/a,{text}", "seed=1,2" if multirun else "seed=1"])
    jobs = compose(Loader(config_name="train", config_path=tree), args.overrides, multirun=multirun)
    assert [job.seed for job in jobs] == ([1, 2] if multirun else [1])
    assert all(job.prompt == text and job.ckpt == f"runs/a,{text}" for job in jobs)
    assert all(as_typed(job.hydra.overrides.task)[0] == f"prompt={text}" for job in jobs)


def test_keys_of_free_text_are_known_by_their_last_name_and_others_are_hydra_s():
    assert quote("data.corpora.files.path=a b") == "data.corpora.files.path='a b'"
    assert quote("callbacks.samples.prompt=a b") == "callbacks.samples.prompt='a b'"
    assert quote("+prompt=a b") == "+prompt='a b'"
    assert quote("seed=1,2") == "seed=1,2"
    assert quote("prompt") == "prompt"
    assert quote("~data.path") == "~data.path"


def test_options_and_overrides_mix_in_any_order():
    args, options = parse(["seed=1", "-m", "attn=flash", "--config-dir", "here"])
    assert args.overrides == ["seed=1", "attn=flash"]
    assert options == ["-m", "--config-dir", "here"]
    assert args.multirun
    assert args.config_dir == "here"


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--multrun"], "--multrun: no such option; did you mean --multirun?"),
        (["--cfg", "jobs"], "argument --cfg/-c: invalid choice: 'jobs'"),
        (["--config-dir"], "argument --config-dir/-cd: expected one argument"),
        (["--experimental-rerun", "x.pickle"], "--experimental-rerun: refused"),
        (["--config-path", "elsewhere"], "--config-path: refused"),
    ],
)
def test_a_wrong_option_is_one_line(argv, problem):
    with pytest.raises(UsageError, match=problem.replace("?", r"\?")) as raised:
        parse(argv)
    assert len(raised.value.problems) == 1


def test_the_home_of_the_user_is_found_in_every_path_typed_or_written(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = OmegaConf.create(
        {
            "seed": 3,
            "run_dir": "~/a\\${seed}",
            "data": {"path": "~", "corpora": {"x": {"path": "~/b"}}},
            "prompt": "~/c",
        }
    )
    expand_home(cfg)
    assert OmegaConf.to_container(cfg, resolve=True) == {
        "seed": 3,
        "run_dir": "/home/me/a${seed}",
        "data": {"path": "/home/me", "corpora": {"x": {"path": "/home/me/b"}}},
        "prompt": "~/c",
    }
