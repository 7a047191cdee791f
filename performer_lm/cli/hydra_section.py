"""What may be set of Hydra's own section, on a command line or in a config file: how jobs are launched and swept.

The rest of the section sets environments, search paths, log handlers and callbacks, and with them whose code runs.
"""

from collections.abc import Iterator, Sequence

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from performer_lm.building import TARGET, resolve
from performer_lm.cli.annotations import leaves

ALLOWED = ("hydra.launcher", "hydra.sweeper", "hydra.mode", "hydra.run.dir", "hydra.sweep.dir", "hydra.verbose")
# Commands that a launcher runs in a shell, and options that may name some: for a command line, not for files.
TYPED_ONLY = ("hydra.launcher.setup", "hydra.launcher.additional_parameters")
KEPT_BY_HYDRA = ("hydra.overrides", "hydra.runtime", *(f"hydra.job.{name}" for name in ("name", "id", "num")))
KEPT_BY_HYDRA += ("hydra.job.override_dirname", "hydra.job.config_name")
PLUGINS = ("hydra._internal.core_plugins", "hydra_plugins", "optuna.samplers")
"""Where launchers and sweepers come from, which Hydra builds itself."""


def refused_overrides(overrides: Sequence[Override]) -> Iterator[str]:
    """Yield a problem for each override of Hydra's section that is not for users to set."""
    for override in overrides:
        key = override.key_or_group.replace("/", ".")
        if override.is_hydra_override() and not _within(key, ALLOWED):
            yield _refusal(override.get_key_element())


def refused_section(job: DictConfig, trusted: DictConfig, typed: Sequence[str]) -> Iterator[str]:
    """Yield a problem for each value of a job's Hydra section that was set and may not be.

    Args:
        job: the job's config.
        trusted: Hydra's section as the entry point's own config files set it.
        typed: the overrides of the command line.
    """
    own, found = (dict(leaves(OmegaConf.to_container(each, resolve=False), "hydra")) for each in (trusted, job.hydra))
    for key, value in found.items():
        if value in (None, [], {}) or (key in own and own[key] == value):
            continue
        if _within(key, TYPED_ONLY) and not any(_within(key, [text.partition("=")[0].lstrip("+")]) for text in typed):
            yield f"{key}: set in a config file; give it on the command line, if its commands are yours"
        elif not _within(key, (*ALLOWED, *KEPT_BY_HYDRA)):
            yield _refusal(key)
        elif key.rpartition(".")[2] == TARGET:
            try:
                resolve(str(value), allowed=PLUGINS)
            except ValueError as refusal:
                yield f"{key}: {refusal}"


def _refusal(key: str) -> str:
    return f"{key}: not for users to set (allowed: {', '.join(ALLOWED)})"


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(f"{key}.".startswith((f"{section}.", f"{section}[")) for section in sections)
