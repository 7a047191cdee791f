"""The sections of a checkpoint: how they are described, and checked to be each of its kind."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from performer_lm.checkpoint.pickles import Foreign
from performer_lm.data.tokenizer.base import Tokenizer
from performer_lm.wording import short

FORMAT: Final = 1
AVERAGES: Final = "averages"  # key of a checkpoint: running averages of the model's parameters by name
MOST_STEPS: Final = 1 << 53

NAMES: Final = {dict: "a section", list: "a list", int: "a whole number"}
OWN: Final[dict[str, type]] = {"model": dict, "tokenizer": dict, "fingerprint": dict, "seed": int}
OWN_OPTIONAL: Final[dict[str, type]] = {"training": dict}
TRAINERS: Final[dict[str, type]] = {
    **{"global_step": int, "loops": dict, "callbacks": dict, AVERAGES: dict},
    **{"optimizer_states": list, "lr_schedulers": list, "random": list},
}
"""Sections of the trainer: a file to generate from needs none of them."""


def describe(
    *,
    model: Mapping[str, Any],
    tokenizer: Tokenizer,
    fingerprint: Mapping[str, Any],
    seed: int,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the plain-data section that makes a file enough to rebuild model and tokenizer, and to know its run."""
    return {
        "format": FORMAT,
        "model": dict(model),
        "tokenizer": tokenizer.to_dict(),
        "fingerprint": dict(fingerprint),
        "seed": seed,
        "training": dict(training or {}),
    }


def check_content(content: Any) -> None:
    """Refuse the content of a file, unless it is a checkpoint of this version's format.

    Raises:
        Foreign: in one line; `OtherFormat` for a file of another format.
    """
    section = content.get("performer_lm") if isinstance(content, dict) else None
    if not isinstance(section, dict) or not isinstance(content.get("state_dict"), dict):
        raise Foreign("it has no `performer_lm` section")
    if section.get("format") != FORMAT or type(section["format"]) is not int:
        raise OtherFormat(f"has checkpoint format {short(section.get('format'))}; this version reads format {FORMAT}")
    for name, wanted in OWN.items():
        if name not in section:
            raise Foreign(f"it has no `{name}` in its `performer_lm` section")
        _check_type(name, section[name], wanted)
    for place, names in ((section, OWN_OPTIONAL), (content, TRAINERS)):
        for name in names.keys() & place.keys():
            _check_type(name, place[name], names[name])
    if not 0 <= content.get("global_step", 0) < MOST_STEPS:
        raise Foreign(f"its global_step is {content['global_step']:,}")
    for name in ("state_dict", AVERAGES):
        _check_weights(name, content.get(name, {}))
    _check_scores(content.get("callbacks", {}))
    for text in _texts({name: value for name, value in section.items() if name != "tokenizer"}):
        if "${" in text:  # it would resolve to whatever it names; a tokenizer holds text of the corpus
            raise Foreign(f"its config holds an interpolation ({text[:60]!r})")


class OtherFormat(Foreign):
    """A format that another version writes."""


def _check_type(name: str, value: Any, wanted: type) -> None:
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise Foreign(f"its {name} is {short(value)}, and not {NAMES[wanted]}")


def _check_weights(section: str, weights: Mapping[Any, Any]) -> None:
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise Foreign(f"it has {short(name)} in its `{section}`, which is no tensor with a name")


def _check_scores(callbacks: Mapping[Any, Any]) -> None:
    for state in callbacks.values():
        score = state.get("best_model_score") if isinstance(state, dict) else None
        value = score.item() if isinstance(score, Tensor) and score.numel() == 1 else score
        if value is not None and type(value) not in (int, float):
            raise Foreign(f"its best_model_score is {short(score)}, and not a number")


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a config, keys among them.

    Raises:
        Foreign: for keys that are no names, and for tensors.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise Foreign(f"it has {short(name)} in its config, which is no name")
            yield name
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Tensor):
        raise Foreign("it holds a tensor in its config")


def find_spoilt(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that holds a number that is not finite."""
    for name, value in weights.items():
        if value.is_floating_point() and value.numel() and not torch.linalg.vector_norm(value, math.inf).isfinite():
            return name
    return None
