"""The words that the user typed: Hydra's options, overrides, and free text made safe for Hydra's grammar.

Hydra reads `key=value` by a grammar with quotes, lists, sweeps and interpolations. Keys that hold free text (a prompt,
a path) must not be read so: their values are quoted here, and arrive exactly as typed, in a single run and in a sweep.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from performer_lm.annotations import leaves
from performer_lm.building import did_you_mean, escape
from performer_lm.cli.errors import UsageError

PATHS = (
    *("cache_dir", "ckpt", "init", "out", "path", "prompts", "run_dir", "save_state", "source", "state", "teacher"),
    "validation_path",
)
# by the last name of the key: data.path, data.corpora.files.path, tokenizer.path
FREE_TEXT = (*PATHS, "prompt", "stop")
REFUSED = {  # options of Hydra's that load what no check sees
    "experimental_rerun": "--experimental-rerun: refused, for it runs whatever a pickle file says; type the overrides",
    "config_path": "--config-path: refused, for the code fits configs/ alone; --config-dir=FOLDER adds files to it",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return Hydra's arguments, with free text quoted, and the words that are options, wherever they stood.

    Raises:
        UsageError: for an option that is unknown or refused.
    """
    parser = _Parser(add_help=False, parents=[get_args_parser()])
    words = [quote(word) for word in argv]
    args, unknown = parser.parse_known_intermixed_args(words)
    known = [option for action in parser._actions for option in action.option_strings]
    problems = [f"{word}: no such option{did_you_mean(word, known)}" for word in unknown]
    problems += [problem for option, problem in REFUSED.items() if getattr(args, option) is not None]
    if problems:
        raise UsageError(*problems)
    return args, [word for word in words if word not in args.overrides]


def is_free_text(key: str) -> bool:
    """Return True if the values of a key are taken as typed."""
    return key.lstrip("+").rpartition(".")[2] in FREE_TEXT and not key.startswith("~")


def quote(override: str) -> str:
    """Return an override with its value quoted for Hydra, if its key holds free text."""
    key, equals, text = override.partition("=")
    return f"{key}={in_quotes(escape(text))}" if equals and is_free_text(key) else override


def in_quotes(text: str) -> str:
    """Return text as Hydra's grammar spells a string."""
    return str(QuotedString(text, Quote.single).with_quotes())


def unresolved(overrides: Any) -> list[str]:
    """Return Hydra's list of overrides as they stand: reading them one by one would resolve the `${...}` in them."""
    texts: Any = overrides if isinstance(overrides, list) else OmegaConf.to_container(overrides, resolve=False)
    return [str(text) for text in texts]


def as_typed(overrides: Any) -> list[str]:
    """Return a job's overrides as they were typed: free text without its quotes."""
    parser = OverridesParser.create()
    texts = [(text.partition("=")[0], text) for text in unresolved(overrides)]
    return [
        f"{key}={OmegaConf.create([parser.parse_override(text).value()])[0]}" if is_free_text(key) else text
        for key, text in texts
    ]


def expand_home(cfg: DictConfig) -> None:
    """Replace `~` at the start of every path of a config, typed or written in a file, by the user's home."""
    for key, value in list(leaves(OmegaConf.to_container(cfg, resolve=False), "")):
        if isinstance(value, str) and value.startswith("~") and key.rpartition(".")[2] in PATHS:
            OmegaConf.update(cfg, key, os.path.expanduser(value))
