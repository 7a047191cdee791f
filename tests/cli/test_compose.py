import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from performer_lm.cli.argv import as_typed, parse, unresolved
from performer_lm.cli.compose import compose, task_config
from performer_lm.cli.errors import UsageError
from performer_lm.cli.loading import Loader


@pytest.fixture
def loader(tree):
    return Loader(config_name="train", config_path=tree)


def test_a_run_is_one_job(loader):
    [job] = compose(loader, ["attn=flash", "seed=3"], multirun=False)
    assert (job.seed, job.attn.nesterov) == (3, True)
    assert sorted(task_config(job)) == ["attn", "ckpt", "data", "model", "optimizer", "prompt", "seed"]
    assert task_config(job).model.eps == 1e-3


def test_a_sweep_is_all_its_jobs(loader):
    jobs = compose(loader, ["attn=flash,exact", "seed=1,2"], multirun=True)
    assert [(job.seed, "nesterov" in job.attn) for job in jobs] == [(1, True), (2, True), (1, False), (2, False)]
    assert [job.hydra.job.num for job in jobs] == [0, 1, 2, 3]


def test_a_sweep_named_by_the_config_needs_no_flag(loader, tree):
    sweep = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2,3'}}}\n"
    (tree / "debug" / "sweep.yaml").write_text(sweep)
    assert [job.seed for job in compose(loader, ["debug=sweep"], multirun=False)] == [1, 2, 3]


def test_what_hydra_knows_at_run_time_resolves_before(loader):
    [job] = compose(loader, ["ckpt=${hydra:runtime.output_dir}/x"], multirun=False)
    HydraConfig.instance().set_config(job)
    assert task_config(job).ckpt.endswith("/out/run/x")


def test_another_folder_adds_choices(tree, tmp_path):
    (tmp_path / "more" / "attn").mkdir(parents=True)
    (tmp_path / "more" / "attn" / "mine.yaml").write_text("lr: 9.0")
    loader = Loader(config_name="train", config_path=tree, config_dir=str(tmp_path / "more"))
    assert compose(loader, ["attn=mine"], multirun=False)[0].attn.lr == 9.0
    with pytest.raises(UsageError, match="no such directory"):
        Loader(config_name="train", config_path=tree, config_dir="nowhere")


def test_overrides_are_read_as_typed():
    assert unresolved(OmegaConf.create(["a=${b}", r"c='\${d}'"])) == ["a=${b}", r"c='\${d}'"]


def test_overrides_come_back_as_typed(loader):
    typed = ["prompt=it's ${a}, 'b'", "seed=2"]
    args, _ = parse(typed)
    [job] = compose(loader, args.overrides, multirun=False)
    assert as_typed(job.hydra.overrides.task) == typed
