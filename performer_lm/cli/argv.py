"""What the user typed, made safe for Hydra's grammar.

Hydra reads `key=value` by a grammar with quotes, lists, sweeps and interpolations. Keys that hold free text (a prompt,
a path) must not be read so: their values are quoted here, and arrive exactly as typed, in a single run, in a sweep and
when a saved `overrides.yaml` is used again.
"""

import argparse
import re
from collections.abc import Collection, Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Quote, QuotedString

from performer_lm.cli.errors import UsageError, did_you_mean

MISSING = "???"  # OmegaConf's word for a value that is yet to be given


class Parser(argparse.ArgumentParser):
    """Hydra's options, with mistakes raised as UsageError and options allowed between overrides."""

    def __init__(self) -> None:
        super().__init__(add_help=False, parents=[get_args_parser()])

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: Sequence[str], *, free_text: Collection[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read `argv` (without the program's name) with free text quoted; return Hydra's arguments and their parser.

    Raises:
        UsageError: for an unknown option.
    """
    parser = Parser()
    args, unknown = parser.parse_known_intermixed_args([quote(item, free_text=free_text) for item in argv])
    options = [option for action in parser._actions for option in action.option_strings]
    if unknown:
        raise UsageError(*(f"{item}: no such option{did_you_mean(item, options)}" for item in unknown))
    if args.experimental_rerun is not None:
        raise UsageError("--experimental-rerun: refused, for it runs whatever a pickle file says; type the overrides")
    return args, parser


def quote(item: str, *, free_text: Collection[str]) -> str:
    """Return the override `item` with its value quoted for Hydra, if its key is one of `free_text`."""
    key, equals, text = item.partition("=")
    if not equals or key.lstrip("+") not in free_text:
        return item
    return f"{key}={QuotedString(escape(text), Quote.single).with_quotes()}"


def escape(text: str) -> str:
    r"""Return what OmegaConf reads back as `text`: `${` becomes `\${`, and backslashes before it are doubled."""
    if text == MISSING:
        return '??${oc.decode:"?"}'
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
