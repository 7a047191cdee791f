import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf

from performer_lm.cli.argv import parse
from performer_lm.cli.compose import Composer, as_typed, task_config, unresolved
from performer_lm.cli.errors import UsageError


@pytest.fixture
def composer(tree):
    setup_globals()
    return Composer(config_name="train", config_path=str(tree))


def test_a_run_is_one_job(composer):
    [job] = composer.compose(["attn=flash", "seed=3"], multirun=False).jobs
    assert (job.seed, job.attn.nesterov) == (3, True)
    assert sorted(task_config(job)) == ["attn", "ckpt", "data", "model", "optimizer", "prompt", "seed"]
    assert task_config(job).model.eps == 1e-3


def test_a_sweep_is_all_its_jobs(composer):
    jobs = composer.compose(["attn=flash,exact", "seed=1,2"], multirun=True).jobs
    assert [(job.seed, "nesterov" in job.attn) for job in jobs] == [(1, True), (2, True), (1, False), (2, False)]
    assert [job.hydra.job.num for job in jobs] == [0, 1, 2, 3]


def test_a_sweep_named_by_the_config_needs_no_flag(composer, tree):
    sweep = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2,3'}}}\n"
    (tree / "debug" / "sweep.yaml").write_text(sweep)
    assert [job.seed for job in composer.compose(["debug=sweep"], multirun=False).jobs] == [1, 2, 3]


def test_what_hydra_knows_at_run_time_resolves_before(composer):
    [job] = composer.compose(["ckpt=${hydra:runtime.output_dir}/x"], multirun=False).jobs
    HydraConfig.instance().set_config(job)
    assert task_config(job).ckpt.endswith("/out/run/x")


def test_another_folder_adds_choices(tree, tmp_path):
    setup_globals()
    (tmp_path / "more" / "attn").mkdir(parents=True)
    (tmp_path / "more" / "attn" / "mine.yaml").write_text("lr: 9.0")
    composer = Composer(config_name="train", config_path=str(tree), config_dir=str(tmp_path / "more"))
    assert composer.compose(["attn=mine"], multirun=False).jobs[0].attn.lr == 9.0
    with pytest.raises(UsageError, match="no such directory"):
        Composer(config_name="train", config_path=str(tree), config_dir="nowhere")


def test_overrides_are_read_as_typed():
    assert unresolved(OmegaConf.create(["a=${b}", r"c='\${d}'"])) == ["a=${b}", r"c='\${d}'"]


def test_overrides_come_back_as_typed(tree):
    setup_globals()
    typed = ["prompt=it's ${a}, 'b'", "seed=2"]
    args, _ = parse(typed, free_text=["prompt"])
    composed = Composer(config_name="train", config_path=str(tree)).compose(args.overrides, multirun=False)
    (job,) = composed.jobs
    assert as_typed(job, job.hydra.overrides.task, free_text=["prompt"]) == typed
