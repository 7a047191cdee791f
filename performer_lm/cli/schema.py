"""The config tree of an entry point, held against the constructors it names once all interpolations are resolved."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from performer_lm.annotations import describe, leaves, mismatches
from performer_lm.checking import Checker
from performer_lm.cli.errors import UsageError
from performer_lm.wording import short

_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.\[\]]*)\}")


def check(
    cfg: DictConfig, *, keys: Mapping[str, Any] | None = None, supplied: Mapping[str, Collection[str]] | None = None
) -> None:
    """Check a composed config against the constructors it names; set absent keys that may be null to null.

    Args:
        cfg: the task's config, without Hydra's own section.
        keys: annotations of the keys that belong to no target, by dotted name: `{"seed": int, "ckpt": str | None}`.
        supplied: by section, the arguments that the entry point adds when it builds it: `{"model": ["vocab_size"]}`.

    Raises:
        UsageError: with one line for each problem: the key, what was wanted, what was got, the nearest name.
    """
    written = dict(leaves(OmegaConf.to_container(cfg, resolve=False), ""))
    references = {key: found[1] for key, text in written.items() if (found := _REFERENCE.fullmatch(str(text)))}
    tree = _resolved(cfg, written, references)
    checker = Checker(keys=keys, supplied=supplied, references=references)
    for key, wanted in checker.keys.items():
        if key not in written and not any(name.startswith((f"{key}.", f"{key}[")) for name in written):
            section = key.rpartition(".")[0]
            if list(mismatches(wanted, None, key)):
                checker.note(key, f"missing; wanted {describe(wanted)}")
            elif section and section in written:
                checker.note(section, f"must be a section with {key}, got {short(written[section])}")
            elif section and any(name.startswith(f"{section}[") for name in written):
                checker.note(section, f"must be a section with {key}, got a list")
            else:
                OmegaConf.update(cfg, key, None, force_add=True)
    checker.visit(tree, "")
    if problems := checker.lines():
        raise UsageError(*problems)


def _resolved(cfg: DictConfig, written: Mapping[str, Any], references: Mapping[str, str]) -> Any:
    """Return a config as plain data.

    Raises:
        UsageError: for the first value that is missing, or interpolation that leads nowhere or has no end.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        told, key = str(error).partition("\n")[0], str(getattr(error, "full_key", ""))
        if "ecursion" in told:
            within = [f"{place}=${{{target}}}" for place, target in references.items() if target not in written]
            raise UsageError(f"sections that hold each other have no end: {', '.join(within)}") from error
        if isinstance(error, MissingMandatoryValue):
            raise UsageError(f"{key}: needs a value: {key}=...") from error
        told = "it gives its resolver the wrong arguments" if told.startswith("TypeError") else told
        raise UsageError(f"{key}: {written.get(key)} does not resolve: {told}") from error
