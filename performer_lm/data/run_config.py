"""The section `data` of a trained run, as its `config.yaml` says, which a stranger may have written.

The file is read as plain data: no interpolation in it is resolved, nothing outside the text sources is built, and the
section is held against the constructors like a command line.
"""

from pathlib import Path
from typing import Any, Final

import yaml
from omegaconf._utils import get_yaml_loader

from performer_lm.annotations import leaves
from performer_lm.checking import Checker
from performer_lm.data.reading import check_regular

CONFIG_BYTES: Final = 1 << 17  # a run's config has some thousands
CONFIG_DEPTH: Final = 64  # of sections within sections
TEXT_TARGETS: Final = ("performer_lm.data.sources.", "performer_lm.data.corpora.", "performer_lm.data.synthetic.")
TOKENIZER: Final = "tokenizer"


def read_data_section(config: Path) -> dict[str, Any]:
    """Return the section `data` of a run's config as plain data, the tokenizer left empty where it takes one.

    Raises:
        ValueError: in one line each, for a file that no run writes, or a section that is none of text.
    """
    section = _read_plain(config).get("data")
    section = dict(section) if isinstance(section, dict) else {}
    takes_tokenizer = section.pop(TOKENIZER, None) is not None
    words = [(word, value) for key, value in leaves(section, "") for word in key.split(".") if word.startswith("_")]
    targets = [section.get("_target_"), *(value if word == "_target_" else word for word, value in words)]
    if not all(str(target).startswith(TEXT_TARGETS) for target in targets):  # nor are Hydra's other words in a run's
        raise ValueError(f"{config} does not say what text the run had")
    checker = Checker(supplied={"data": [TOKENIZER]})
    checker.visit({"data": section}, "")
    if problems := checker.lines():
        raise ValueError("\n".join(f"{config}: {problem}" for problem in problems))
    return section | ({TOKENIZER: None} if takes_tokenizer else {})


def _read_plain(config: Path) -> dict[str, Any]:
    check_regular(config)
    try:
        with config.open("rb") as file:
            text = file.read(CONFIG_BYTES + 1)
        if len(text) > CONFIG_BYTES:
            raise ValueError(f"it is longer than {CONFIG_BYTES:,} bytes")
        _check_shape(text)
        plain = yaml.load(text, Loader=get_yaml_loader())
    except (ValueError, OSError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{config} is not the config of a run: {str(error).splitlines()[0]}") from None
    return plain if isinstance(plain, dict) else {}


def _check_shape(text: bytes) -> None:
    """Refuse aliases, 40 of which fill any memory, deep nesting, which takes for ever to read, and tags."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"it holds a tag ({event.tag[:60]})")
        if isinstance(event, yaml.AliasEvent) or depth > CONFIG_DEPTH:
            raise ValueError("it holds an alias" if depth <= CONFIG_DEPTH else "it is nested too deeply")
