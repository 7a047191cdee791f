"""From the overrides of a command line to the config of every job, before the first one starts."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from performer_lm.cli.argv import expand_home, unresolved
from performer_lm.cli.errors import UsageError
from performer_lm.cli.hydra_section import check_overrides, check_section
from performer_lm.cli.loading import Loader


def compose(loader: Loader, overrides: Sequence[str], *, multirun: bool) -> list[DictConfig]:
    """Return the config of each job, with Hydra's section as the job will see it.

    Raises:
        UsageError: for the first value of Hydra's section that may not be set.
    """
    jobs, trusted = _jobs(loader, overrides, multirun=multirun), loader.load([]).hydra
    for job in jobs:
        check_section(job, trusted, overrides)
    return jobs


def task_config(job: DictConfig) -> DictConfig:
    """Return a job's config without Hydra's own section, as the task gets it."""
    cfg = OmegaConf.masked_copy(job, [key for key in map(str, job) if key != "hydra"])
    expand_home(cfg)
    return cfg


def is_sweep(job: DictConfig) -> bool:
    """Return True for the config of a job that is one of several."""
    return bool(job.hydra.mode == RunMode.MULTIRUN)


def _jobs(loader: Loader, overrides: Sequence[str], *, multirun: bool) -> list[DictConfig]:
    cfg = loader.load(overrides)
    parsed = loader.parse(overrides)
    if not multirun and not is_sweep(cfg):
        if any(override.is_sweep_override() for override in parsed):
            raise ValueError("several values in a single run")
        return [_place(cfg, cfg.hydra.run.dir)]
    swept = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.get("params") or {}).items()]
    check_overrides(loader.parse(swept))
    typed = loader.parse([*swept, *unresolved(cfg.hydra.overrides.task)])
    is_basic = cfg.hydra.runtime.choices["hydra/sweeper"] == "basic"
    given = {override.get_key_element(): _values(override, is_basic=is_basic) for override in typed}  # the last counts
    if is_basic:
        batches = list(itertools.product(*given.values()))
    else:  # its jobs are not known yet: each value stands in one of these at least
        most = max(map(len, given.values()), default=1)
        batches = [tuple(values[index % len(values)] for values in given.values()) for index in range(most)]
    return [_job(loader, cfg, index, batch) for index, batch in enumerate(batches)]


def _values(override: Override, *, is_basic: bool) -> list[str]:
    """Return an override for each value that it sweeps over."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.is_discrete_sweep():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    if is_basic:
        raise UsageError(f"{override.input_line}: intervals need a sweeper that samples them: hydra/sweeper=optuna")
    return [f"{key}={override.value().start}"]  # type: ignore[union-attr]


def _job(loader: Loader, sweep: DictConfig, index: int, overrides: Sequence[str]) -> DictConfig:
    job = loader.hydra.load_sweep_config(sweep, list(overrides))
    with open_dict(job):
        job.hydra.job.id, job.hydra.job.num, job.hydra.mode = str(index), index, RunMode.MULTIRUN
    return _place(job, f"{job.hydra.sweep.dir}/{index}")


def _place(job: DictConfig, output_dir: str) -> DictConfig:
    """Fill in the values that Hydra knows only when a job runs, so that `${hydra:...}` can be resolved before."""
    HydraConfig.instance().set_config(job)
    OmegaConf.set_readonly(job.hydra, False)
    with open_dict(job.hydra):
        job.hydra.runtime.output_dir = str(Path(output_dir).absolute())
    return job
