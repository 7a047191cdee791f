"""From the command line's overrides to the config of every job, before the first one starts."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from performer_lm.cli.choices import dotted_choice
from performer_lm.cli.errors import UsageError
from performer_lm.cli.mistakes import COMPOSITION_ERRORS, Mistakes, in_one_line

_BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"


@dataclass(frozen=True)
class Composed:
    """The jobs that could be composed from the overrides that are right, and what is wrong with the others."""

    jobs: list[DictConfig]
    problems: list[str] = field(default_factory=list)
    error: Exception | None = None


class Composer:
    """Composes the jobs of one command line, with Hydra's own loader."""

    def __init__(self, *, config_name: str, config_path: str, config_dir: str | None = None) -> None:
        search_path = create_config_search_path(config_path)
        if config_dir is not None:
            if not Path(config_dir).is_dir():
                raise UsageError(f"--config-dir={config_dir}: no such directory")
            anchor = SearchPathQuery(provider="schema")
            search_path.prepend(provider="command-line", path=f"file://{Path(config_dir).absolute()}", anchor=anchor)
        self.config_name = config_name
        self.loader = ConfigLoaderImpl(search_path)

    def compose(self, overrides: Sequence[str], *, multirun: bool) -> Composed:
        """Return the config of each job, with Hydra's section as the job will see it.

        What fails is explained override by override. Wrong keys are left out and the rest is composed, so that what
        else is wrong can be found too; after a wrong choice it is not known which keys there are.
        """
        try:
            dotted = self._dotted(overrides)
            rest = [text for text in overrides if text not in dotted]
            return Composed(self._jobs(rest, multirun=multirun), list(dotted.values()))
        except COMPOSITION_ERRORS as error:
            mistakes = self._mistakes(overrides, multirun=multirun)
            problems = [*mistakes.choices.values(), *mistakes.keys.values()] or [in_one_line(error)]
            if mistakes.choices or not mistakes.keys:
                return Composed([], problems, error)
            return Composed(self._rest(overrides, mistakes, multirun=multirun), problems, error)

    def explain(self, error: Exception, overrides: Sequence[str], *, multirun: bool) -> UsageError:
        """Return what is wrong with `overrides`, or else what `error` says."""
        mistakes = self._mistakes(overrides, multirun=multirun)
        return UsageError(*([*mistakes.choices.values(), *mistakes.keys.values()] or [in_one_line(error)]))

    def _dotted(self, overrides: Sequence[str]) -> dict[str, str]:
        """Return, with its problem, each override that Hydra takes for a value and its user means as a choice."""
        parsed = OverridesParser.create(self.loader).parse_overrides(list(overrides))
        problems = ((str(override.input_line), dotted_choice(self.loader, override)) for override in parsed)
        return {text: problem for text, problem in problems if problem}

    def _mistakes(self, overrides: Sequence[str], *, multirun: bool) -> Mistakes:
        return Mistakes.find(self.loader, self.config_name, overrides, multirun=multirun)

    def _rest(self, overrides: Sequence[str], mistakes: Mistakes, *, multirun: bool) -> list[DictConfig]:
        try:
            return self._jobs([text for text in overrides if text not in mistakes.keys], multirun=multirun)
        except COMPOSITION_ERRORS:
            return []

    def _jobs(self, overrides: Sequence[str], *, multirun: bool) -> list[DictConfig]:
        sweep = self.loader.load_configuration(
            self.config_name, list(overrides), run_mode=RunMode.MULTIRUN, validate_sweep_overrides=multirun
        )
        if not multirun and sweep.hydra.mode != RunMode.MULTIRUN:
            run = self.loader.load_configuration(self.config_name, list(overrides), run_mode=RunMode.RUN)
            _place(run, run.hydra.run.dir)
            return [run]
        if sweep.hydra.sweeper.get("_target_") != _BASIC_SWEEPER:
            return [sweep]  # another sweeper's jobs are not known yet; each is checked as it starts
        swept = [f"{key}={value}" for key, value in (sweep.hydra.sweeper.params or {}).items()]
        typed = unresolved(sweep.hydra.overrides.task)
        parsed = OverridesParser.create(self.loader).parse_overrides(swept + typed)
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return [self._job(sweep, index, job_overrides) for index, job_overrides in enumerate(batches[0])]

    def _job(self, sweep: DictConfig, index: int, overrides: list[str]) -> DictConfig:
        job = self.loader.load_sweep_config(sweep, overrides)
        with open_dict(job):
            job.hydra.job.id, job.hydra.job.num = str(index), index
        _place(job, f"{job.hydra.sweep.dir}/{index}")
        return job


def task_config(job: DictConfig) -> DictConfig:
    """Return a job's config without Hydra's own section, as the task gets it."""
    return OmegaConf.masked_copy(job, [key for key in map(str, job) if key != "hydra"])


def unresolved(overrides: Any) -> list[str]:
    """Return Hydra's list of overrides as typed: reading them one by one would resolve the `${...}` in them."""
    texts: Any = OmegaConf.to_container(overrides, resolve=False)
    return [str(text) for text in texts]


def as_typed(cfg: DictConfig, overrides: Any, *, free_text: Collection[str]) -> list[str]:
    """Return a job's overrides as they were typed: the values of `free_text` keys without their quotes."""
    texts = overrides if isinstance(overrides, list) else unresolved(overrides)
    keyed = [(text.partition("=")[0].lstrip("+"), text) for text in texts]
    return [f"{key}={OmegaConf.select(cfg, key)}" if key in free_text else text for key, text in keyed]


def _place(job: DictConfig, output_dir: str) -> None:
    """Fill in what Hydra knows only when a job runs, so that `${hydra:...}` can be resolved before."""
    HydraConfig.instance().set_config(job)
    OmegaConf.set_readonly(job.hydra, False)
    with open_dict(job.hydra):
        job.hydra.runtime.output_dir = str(Path(output_dir).absolute())
