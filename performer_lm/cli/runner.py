"""Run a task as the command line asks: check first, run every job, and leave with the exit code that fits."""

import functools
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from omegaconf import DictConfig, OmegaConf

from performer_lm.cli.argv import as_typed, expand_home, in_quotes, parse, quote, unresolved
from performer_lm.cli.compose import compose, is_sweep, task_config
from performer_lm.cli.errors import JobFailed, UsageError, in_short, report
from performer_lm.cli.hydra_section import check_overrides
from performer_lm.cli.loading import Loader
from performer_lm.cli.mistakes import explaining, meant_as_choices
from performer_lm.cli.schema import check
from performer_lm.cli.sweeps import Sweep, note_failure, sweeping

Task = Callable[[DictConfig], float | None]
Check = Callable[[DictConfig], None]
FULL_ERROR = "HYDRA_FULL_ERROR"
RANK_OVERRIDES = "PERFORMER_LM_OVERRIDES"  # as training.processes sets it; not imported, for that takes seconds


def main(
    task: Task,
    *,
    config_name: str,
    config_path: str | Path,
    keys: Mapping[str, Any] | None = None,
    supplied: Mapping[str, Collection[str]] | None = None,
    sweep: Sweep | None = None,
) -> NoReturn:
    """Run `task` as the command line asks, and exit.

    Args:
        task: takes the composed and checked config; its result is a sweep's objective.
        config_name: the root config, without `.yaml`.
        config_path: the folder it lies in, absolute.
        keys: annotations of the keys that belong to no target, see `check`.
        supplied: arguments that the task adds to what it builds, see `check`.
        sweep: what becomes of sweeps; None for a task that runs once.

    Set HYDRA_FULL_ERROR=1 to see tracebacks of mistakes too.
    """
    is_asked = os.environ.get(FULL_ERROR) == "1"
    check_job = functools.partial(check, keys=keys, supplied=supplied)
    try:
        _launch(task, check_job, config_name, Path(config_path).absolute(), sweep, is_asked=is_asked)
    except BaseException as error:  # the outermost frame: every ending has its exit code
        sys.exit(report(error, show_traceback=is_asked))
    sys.exit(0)


def _launch(
    task: Task, check_job: Check, config_name: str, config_path: Path, sweep: Sweep | None, *, is_asked: bool
) -> None:
    args, options = parse(sys.argv[1:])
    told = os.environ.get(RANK_OVERRIDES)
    if told is not None and os.environ.get("LOCAL_RANK", "0") != "0":  # the first rank's job, not the sweep around it
        args.multirun, args.overrides = False, [quote(text) for text in json.loads(told)]
    loader = Loader(config_name=args.config_name or config_name, config_path=config_path, config_dir=args.config_dir)
    with explaining(loader, args.overrides, multirun=args.multirun):
        if args.shell_completion:
            return _run_hydra(loader, task, options)
        check_overrides(loader.parse(args.overrides))
        if args.help or args.hydra_help or args.cfg or args.info or args.resolve:
            return _run_hydra(loader, task, [*options, *args.overrides])
        jobs = compose(loader, args.overrides, multirun=args.multirun)
    if sweep is None and (args.multirun or is_sweep(jobs[0])):
        raise UsageError(f"--multirun: {Path(sys.argv[0]).name} runs once; give each key one value")
    configs = _checked(loader, jobs, args.overrides, check_job)
    HydraConfig.instance().set_config(jobs[0])
    if sweep is None or not is_sweep(jobs[0]):
        task(configs[0])
        return None
    folder = str(OmegaConf.select(configs[0], sweep.folder_key))
    kept = f"hydra.sweep.dir={in_quotes(folder)}"  # where Hydra and its launchers keep what is theirs
    guarded = _guarded(task, check_job, is_asked=is_asked)
    with sweeping(sweep, Path(folder)), explaining(loader, args.overrides, multirun=True):
        return _run_hydra(loader, guarded, [*options, *args.overrides, kept])


def _checked(
    loader: Loader, jobs: Sequence[DictConfig], overrides: Sequence[str], check_job: Check
) -> list[DictConfig]:
    """Return the task's config of every job, checked; a problem that several jobs share is told once."""
    configs, problems = [], list[str]()
    for job in jobs:
        HydraConfig.instance().set_config(job)
        configs.append(task_config(job))
        try:
            check_job(configs[-1])
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError(*(meant_as_choices(loader, overrides) or dict.fromkeys(problems)))
    return configs


def _run_hydra(loader: Loader, task: Task, words: Sequence[str]) -> None:
    """Run Hydra on the words: a sweep, or a config to show."""
    before = sys.argv
    sys.argv = [before[0], *words]
    run = hydra.main(version_base="1.3", config_path=str(loader.config_path), config_name=loader.config_name)(task)
    try:
        with env_override({FULL_ERROR: "1"}):  # Hydra raises what it would otherwise print
            run()
    finally:
        sys.argv = before


def _guarded(task: Task, check_job: Check, *, is_asked: bool) -> Task:
    """Return `task` with its errors reported where they happen, so that the other jobs of a sweep go on."""

    @functools.wraps(task)
    def guarded(cfg: DictConfig) -> float | None:
        try:
            expand_home(cfg)
            check_job(cfg)
            return task(cfg)
        except Exception as error:
            job = HydraConfig.get()
            overrides = unresolved(job.overrides.task)
            code = report(error, job=f"job {job.job.num} ({' '.join(overrides)}): ", show_traceback=is_asked)
            note_failure(int(job.job.num), as_typed(overrides), code=code, error=in_short(error))
            raise JobFailed(code) from error

    return guarded
