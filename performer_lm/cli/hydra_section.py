"""What may be set of Hydra's own section, on a command line or in a config file: how jobs are launched and swept.

The rest of the section sets environments, search paths, log handlers and callbacks, and with them whose code runs.
"""

from collections.abc import Sequence

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from performer_lm.annotations import leaves
from performer_lm.building import TARGET, resolve
from performer_lm.cli.errors import UsageError

ALLOWED = ("hydra.launcher", "hydra.sweeper", "hydra.mode", "hydra.run.dir", "hydra.sweep.dir", "hydra.verbose")
# Commands that a launcher runs in a shell, and options that may name some: for a command line, not for files.
TYPED_ONLY = ("hydra.launcher.setup", "hydra.launcher.additional_parameters")
KEPT_BY_HYDRA = ("hydra.overrides", "hydra.runtime", *(f"hydra.job.{name}" for name in ("name", "id", "num")))
KEPT_BY_HYDRA += ("hydra.job.override_dirname", "hydra.job.config_name")
PLUGINS = ("hydra._internal.core_plugins", "hydra_plugins", "optuna.samplers")
"""Where launchers and sweepers come from, which Hydra builds itself."""


def check_overrides(overrides: Sequence[Override]) -> None:
    """Refuse overrides of Hydra's section that are not for users to set, before anything is composed.

    Raises:
        UsageError: for the first of them.
    """
    for override in overrides:
        if override.is_hydra_override() and not _within(override.key_or_group.replace("/", "."), ALLOWED):
            raise UsageError(_refusal(override.get_key_element()))


def check_section(job: DictConfig, trusted: DictConfig, typed: Sequence[str]) -> None:
    """Refuse values of a job's Hydra section that were set and may not be.

    Args:
        job: the job's config.
        trusted: Hydra's section as the entry point's own config files set it.
        typed: the overrides of the command line.

    Raises:
        UsageError: for the first of them.
    """
    own, found = (dict(leaves(OmegaConf.to_container(each, resolve=False), "hydra")) for each in (trusted, job.hydra))
    for key, value in found.items():
        if value in (None, [], {}) or (key in own and own[key] == value):
            continue
        if _within(key, TYPED_ONLY) and not any(_within(key, [text.partition("=")[0].lstrip("+")]) for text in typed):
            raise UsageError(f"{key}: set in a config file; give it on the command line, if its commands are yours")
        if not _within(key, (*ALLOWED, *KEPT_BY_HYDRA)):
            raise UsageError(_refusal(key))
        if key.rpartition(".")[2] == TARGET:
            try:
                resolve(str(value), allowed=PLUGINS)
            except ValueError as refusal:
                raise UsageError(f"{key}: {refusal}") from refusal


def _refusal(key: str) -> str:
    return f"{key}: not for users to set (allowed: {', '.join(ALLOWED)})"


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(f"{key}.".startswith((f"{section}.", f"{section}[")) for section in sections)
