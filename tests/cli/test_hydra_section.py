import pytest

from performer_lm.cli.compose import compose
from performer_lm.cli.errors import UsageError
from performer_lm.cli.hydra_section import check_overrides
from performer_lm.cli.loading import Loader
from performer_lm.cli.mistakes import explaining

CORE = "hydra._internal.core_plugins"


@pytest.fixture
def loader(tree):
    """Return the loader of a tree with a launcher that takes more than Hydra's own."""
    (tree / "hydra" / "launcher").mkdir(parents=True)
    (tree / "hydra" / "launcher" / "open.yaml").write_text(
        f"{{_target_: {CORE}.basic_launcher.BasicLauncher, setup: []}}"
    )
    return Loader(config_name="train", config_path=tree)


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.job.env_set.PYTHONPATH=/tmp",
        "hydra.job.env_set={PYTHONPATH:/tmp}",
        "hydra.job.env_copy=[HOME]",
        "hydra.searchpath=[pkg://evil]",
        "+hydra.callbacks.x._target_=os.system",
        "hydra.job_logging.version=2",
        "hydra/job_logging=default",
        "hydra/hydra_logging=default",
        "+hydra/callbacks=x",
        "hydra.job.chdir=true",
        "hydra.output_subdir=x",
        "~hydra.sweep",
    ],
)
def test_hydra_s_section_is_not_for_command_lines_beyond_how_jobs_run(loader, override):
    with pytest.raises(UsageError, match="not for users to set") as raised:
        check_overrides(loader.parse([override]))
    assert len(raised.value.problems) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("job: {env_set: {PYTHONPATH: /tmp}}", "hydra.job.env_set.PYTHONPATH: not for users to set"),
        ("job: {env_copy: [HOME]}", "hydra.job.env_set.HOME: not for users to set"),
        ("job: {env_copy: [NO_SUCH_VARIABLE]}", "debug=fast: 'NO_SUCH_VARIABLE'"),
        ("searchpath: ['pkg://evil']", "debug=fast: In 'debug/fast': Overriding hydra.searchpath is only supported"),
        ("callbacks: {x: {_target_: os.system}}", "hydra.callbacks.x._target_: not for users to set"),
        ("job_logging: {handlers: {a: {(): os.system}}}", "hydra.job_logging.handlers.a.(): not for users to set"),
        ("hydra_logging: {handlers: {a: {class: evil}}}", "hydra.hydra_logging.handlers.a.class: not for users to set"),
        ("output_subdir: x", "hydra.output_subdir: not for users to set"),
        ("launcher: {_target_: os.system}", "hydra.launcher._target_: 'os.system' may not be built from a config"),
        ("launcher: {deep: {_target_: evil.X}}", "hydra.launcher.deep._target_: 'evil.X' may not be built"),
        ("launcher: {setup: [touch x]}", "hydra.launcher.setup[0]: set in a config file"),
        ("sweeper: {params: {+hydra.job.env_set.A: b}}", "+hydra.job.env_set.A: not for users to set"),
    ],
)
def test_nor_is_it_for_config_files(loader, tree, text, problem):
    (tree / "debug" / "fast.yaml").write_text(f"# @package _global_\nhydra:\n  {text}\n  mode: MULTIRUN\n")
    words = ["hydra/launcher=open", "debug=fast"]
    with pytest.raises(UsageError) as raised, explaining(loader, words, multirun=False):
        compose(loader, words, multirun=False)
    assert raised.value.problems[0].startswith(problem)


def test_every_file_that_a_sweep_may_choose_is_looked_at(loader, tree):
    (tree / "debug" / "evil.yaml").write_text("# @package _global_\nhydra: {job: {env_set: {A: b}}}\n")
    (tree / "debug" / "good.yaml").write_text("# @package _global_\nseed: 1\n")
    (tree / "hydra" / "sweeper").mkdir()
    (tree / "hydra" / "sweeper" / "other.yaml").write_text(f"_target_: {CORE}.basic_sweeper.BasicSweeper")
    for words in (["debug=good,evil"], ["hydra/sweeper=other", "debug=good,evil", "seed=interval(0,1)"]):
        with pytest.raises(UsageError, match=r"hydra\.job\.env_set\.A: not for users to set"):
            compose(loader, words, multirun=True)


def test_another_folder_adds_files_and_replaces_none(tree, tmp_path):
    more = tmp_path / "more"
    for name in ("train.yaml", "attn/favor.yaml", "hydra/job_logging/disabled.yaml", "hydra/env/default.yaml"):
        (more / name).parent.mkdir(parents=True, exist_ok=True)
        (more / name).write_text("# @package _global_\nseed: 13\nhydra: {job: {env_set: {A: b}}}\n")
    [job] = compose(Loader(config_name="train", config_path=tree, config_dir=str(more)), [], multirun=False)
    assert (job.seed, dict(job.hydra.job.env_set)) == (0, {})


def test_how_jobs_run_is_for_users_to_set(loader, tree):
    (tree / "debug" / "fast.yaml").write_text("# @package _global_\nhydra: {sweeper: {params: {seed: '1,2'}}}\n")
    words = [
        "debug=fast",
        "hydra.sweep.dir=x",
        "hydra/launcher=open",
        "hydra.launcher.setup=[module load x]",
        "hydra.verbose=true",
    ]
    check_overrides(loader.parse(words))
    assert [job.seed for job in compose(loader, words, multirun=True)] == [1, 2]
