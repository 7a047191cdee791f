"""Compositions of configs/ of which a process makes the costly part once.

For each command line Hydra reads some thirty files and merges them, before it sets what was typed: a third of a second,
and a test of mistakes composes several times. The files stay as they are while tests run, and what they merge into
depends on the choices alone. Where files lie elsewhere too (`--config-dir`), Hydra does all of its work.
"""

import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource

Key = tuple[Any, ...]


def compose_once(configs: str) -> None:
    """Let Hydra read, list and merge the files of a folder once for each choice in this process."""
    read_file = FileConfigSource.load_config
    list_files = config_loader_impl.create_defaults_list
    merge_files = ConfigLoaderImpl._compose_config_from_defaults_list
    read: dict[str, bytes] = {}  # loading bytes is faster than copying what they hold
    listed: dict[Key, Any] = {}
    merged: dict[Key, bytes] = {}

    def sources(repo: Any) -> Key | None:
        found = tuple((source.scheme(), source.path) for source in repo.get_sources())
        return found if {path for scheme, path in found if scheme == "file"} == {configs} else None

    def read_once(self: FileConfigSource, config_path: str) -> Any:
        if self.path != configs:
            return read_file(self, config_path)
        if config_path not in read:
            read[config_path] = pickle.dumps(read_file(self, config_path))
        return pickle.loads(read[config_path])

    def list_once(*, repo: Any, overrides_list: Sequence[Any], **options: Any) -> Any:
        key = sources(repo)
        if key is None:
            return list_files(repo=repo, overrides_list=overrides_list, **options)
        given = [override for override in overrides_list if not override.is_sweep_override()]
        choices = [
            each for each in given if repo.group_exists(each.key_or_group) and not isinstance(each.value(), dict)
        ]
        key += (*sorted(options.items()), *(each.input_line for each in choices))
        if key not in listed:
            listed[key] = list_files(repo=repo, overrides_list=choices, **options)
        return dataclasses.replace(listed[key], config_overrides=[each for each in given if each not in choices])

    def merge_once(self: ConfigLoaderImpl, *, defaults: Sequence[Any], repo: Any) -> Any:
        key = sources(repo)
        if key is None:
            return merge_files(self, defaults=defaults, repo=repo)
        key += tuple(map(dataclasses.astuple, defaults))
        if key not in merged:
            merged[key] = pickle.dumps(merge_files(self, defaults=defaults, repo=repo))
        return pickle.loads(merged[key])

    FileConfigSource.load_config = read_once
    config_loader_impl.create_defaults_list = list_once
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once
