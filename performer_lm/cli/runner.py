"""Run a task under Hydra: check first, run every job, and leave with the exit code that tells what happened."""

import argparse
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra import version
from hydra._internal.utils import _run_hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from performer_lm.cli.argv import parse, quote
from performer_lm.cli.compose import Composed, Composer, as_typed, task_config, unresolved
from performer_lm.cli.errors import JobFailed, UsageError, in_short, report
from performer_lm.cli.mistakes import COMPOSITION_ERRORS
from performer_lm.cli.schema import check
from performer_lm.cli.sweeps import Sweep, note_failure, sweeping
from performer_lm.cli.targets import refused_in_hydra

Task = Callable[[DictConfig], float | None]
FULL_ERROR = "HYDRA_FULL_ERROR"
RANK_OVERRIDES = "PERFORMER_LM_OVERRIDES"  # as training.processes sets it; not imported, for that takes seconds


def main(
    task: Task,
    *,
    config_name: str,
    config_path: str | Path,
    free_text: Collection[str] = (),
    keys: Mapping[str, Any] | None = None,
    supplied: Mapping[str, Collection[str]] | None = None,
    sweep: Sweep | None = None,
) -> NoReturn:
    """Run `task` as the command line asks, and exit.

    Args:
        task: takes the composed and checked config; its result is a sweep's objective.
        config_name: the root config, without `.yaml`.
        config_path: the folder it lies in, absolute.
        free_text: keys whose values are taken as typed, whatever they hold: `ckpt=runs/a,b`, `prompt="def main("`.
        keys: annotations of the keys that belong to no target, see `check`.
        supplied: arguments that the task adds to what it builds, see `check`.
        sweep: what becomes of sweeps.

    Set HYDRA_FULL_ERROR=1 to see tracebacks of mistakes too.
    """
    check_job = functools.partial(check, keys=keys, supplied=supplied)
    asked = os.environ.get(FULL_ERROR)
    try:
        _launch(task, check_job, config_name, Path(config_path).absolute(), free_text, asked, sweep)
    except BaseException as error:  # the outermost frame: every ending has its exit code
        sys.exit(report(error, show_traceback=asked == "1"))
    sys.exit(0)


def _launch(
    task: Task,
    check_job: Callable[[DictConfig], None],
    config_name: str,
    config_path: Path,
    free_text: Collection[str],
    asked: str | None,
    sweep: Sweep | None,
) -> None:
    args, parser = parse(sys.argv[1:], free_text=free_text)
    _join_first_rank(args, free_text)
    if args.config_path is not None and not args.config_path.startswith("pkg://"):
        args.config_path = str(Path(inspect.getfile(task)).parent.absolute() / args.config_path)
    version.setbase("1.3")
    setup_globals()
    composer = Composer(
        config_name=args.config_name or config_name,
        config_path=args.config_path or str(config_path),
        config_dir=args.config_dir,
    )
    overrides = [] if args.shell_completion else list(args.overrides)
    jobs: list[DictConfig] = []
    if not (args.help or args.hydra_help or args.cfg or args.info or args.shell_completion):
        composed = composer.compose(overrides, multirun=args.multirun)
        _check_all(composed, check_job)
        jobs = composed.jobs
    folder = _folder_of(sweep, jobs, multirun=args.multirun)
    if folder is not None:  # where Hydra and its launchers keep what is theirs
        args.overrides.append(quote(f"hydra.sweep.dir={folder}", free_text=["hydra.sweep.dir"]))
    try:
        with _environment(FULL_ERROR, "1"), sweeping(sweep, folder):  # Hydra raises what it would otherwise print
            _run_hydra(
                args=args,
                args_parser=parser,
                task_function=_guarded(task, check_job, asked, free_text),
                config_path=str(config_path),
                config_name=config_name,
            )
    except COMPOSITION_ERRORS as error:
        raise composer.explain(error, overrides, multirun=args.multirun) from error


def _folder_of(sweep: Sweep | None, jobs: Sequence[DictConfig], *, multirun: bool) -> Path | None:
    """Return the one folder of a sweep's jobs; None for a single run."""
    if sweep is None or not jobs or not (multirun or jobs[0].hydra.mode == RunMode.MULTIRUN):
        return None
    HydraConfig.instance().set_config(jobs[0])
    return Path(str(OmegaConf.select(task_config(jobs[0]), sweep.folder_key)))


def _join_first_rank(args: argparse.Namespace, free_text: Collection[str]) -> None:
    """Run the one job that the first rank of a run has started this process for, not the sweep it may belong to."""
    told = os.environ.get(RANK_OVERRIDES)
    if told is not None and os.environ.get("LOCAL_RANK", "0") != "0":
        args.multirun = False
        args.overrides = [quote(text, free_text=free_text) for text in json.loads(told)]


def _check_all(composed: Composed, check_job: Callable[[DictConfig], None]) -> None:
    """Check every job before the first one starts; a problem that several jobs share is told once."""
    problems = list(composed.problems)
    for job in composed.jobs:
        problems += refused_in_hydra(OmegaConf.to_container(job.hydra, resolve=False))
        HydraConfig.instance().set_config(job)
        try:
            check_job(task_config(job))
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError(*dict.fromkeys(problems)) from composed.error


def _guarded(
    task: Task, check_job: Callable[[DictConfig], None], asked: str | None, free_text: Collection[str]
) -> Task:
    """Return `task` with its errors reported where they happen, so that the other jobs of a sweep can go on."""

    @functools.wraps(task)
    def guarded(cfg: DictConfig) -> float | None:
        try:
            with _environment(FULL_ERROR, asked):
                check_job(cfg)
                return task(cfg)
        except Exception as error:
            hydra = HydraConfig.get()
            if hydra.mode != RunMode.MULTIRUN:
                raise SystemExit(report(error, show_traceback=asked == "1")) from error
            overrides = unresolved(hydra.overrides.task)
            code = report(error, job=f"job {hydra.job.num} ({' '.join(overrides)}): ", show_traceback=asked == "1")
            typed = as_typed(cfg, overrides, free_text=free_text)
            note_failure(int(hydra.job.num), typed, code=code, error=in_short(error))
            raise JobFailed(code) from error

    return guarded


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable (None removes it), and put back what was there."""
    before = os.environ.get(name)
    _set(name, value)
    try:
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
