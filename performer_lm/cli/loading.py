"""The config files of one entry point, through Hydra's own loader."""

from collections.abc import Sequence
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from performer_lm.building import did_you_mean
from performer_lm.cli.argv import in_quotes
from performer_lm.cli.errors import UsageError

COMPOSITION_ERRORS = (
    *(HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError),
    *(AssertionError, AttributeError),  # OmegaConf's, for a key below null
    KeyError,  # a variable that the environment lacks
    RecursionError,  # files that include each other
    TypeError,  # a list of choices that holds something else than names
)
"""The errors that Hydra raises for mistakes in overrides and config files."""


class Loader:
    """Composes configs from the files below a folder.

    Args:
        config_name: the root config, without `.yaml`.
        config_path: the folder it lies in.
        config_dir: another folder, whose files are choices too; those of `config_path` come first.

    Raises:
        UsageError: for a config or folder that is not there.
    """

    def __init__(self, *, config_name: str, config_path: Path, config_dir: str | None = None) -> None:
        names = sorted(path.stem for path in config_path.glob("[!_]*.yaml"))
        if config_name not in names:
            raise UsageError(no_choice("--config-name", config_name, names))
        self.more: list[str] = []
        if config_dir is not None:
            if not Path(config_dir).is_dir():
                raise UsageError(f"--config-dir={config_dir}: no such directory")
            self.more.append(f"hydra.searchpath=[{in_quotes(f'file://{Path(config_dir).absolute()}')}]")
        with initialize_config_dir(str(config_path), version_base="1.3"):
            self.hydra = GlobalHydra.instance().config_loader()
        self.config_name, self.config_path = config_name, config_path

    def load(self, overrides: Sequence[str]) -> DictConfig:
        """Return the config that overrides compose, sweeps left out."""
        return self.hydra.load_configuration(self.config_name, [*self.more, *overrides], run_mode=RunMode.MULTIRUN)

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Return overrides as Hydra's grammar reads them."""
        return OverridesParser.create(self.hydra).parse_overrides(list(overrides))

    def choices(self, overrides: Sequence[str]) -> dict[str, str]:
        """Return the file that each config group takes, by group: of the defaults, changed by overrides."""
        found = self.hydra.compute_defaults_list(self.config_name, [*self.more, *overrides], RunMode.MULTIRUN)
        return {str(group): str(name) for group, name in found.overrides.known_choices.items()}

    def options(self, group: str, *, kind: ObjectType = ObjectType.CONFIG) -> list[str]:
        """Return the files of a group that are for users to choose, or the groups inside it."""
        names = self.hydra.get_group_options(group, kind, self.config_name, list(self.more))
        return [name for name in names if not name.startswith("_")]

    def is_choice(self, override: Override) -> bool:
        """Return True if an override chooses a file, rather than setting a key."""
        return bool(self.options(override.key_or_group)) and not isinstance(override.value(), dict)


def no_choice(key: str, name: str, names: Sequence[str]) -> str:
    """Return the line for a file that is not there."""
    return f"{key}={name}: no such choice{did_you_mean(name, names, prefix=f'{key}=')} (choices: {', '.join(names)})"
