"""Attention sections as the words of a command line: `attn=hybrid attn.pattern=[...]`, and the options that differ.

A section is what a config or a checkpoint says of a backend: plain data with a `_target_`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from performer_lm.building import PARTIAL, TARGET, Factory

Section = Mapping[str, Any]
PATTERN: Final = "pattern"
BACKENDS: Final = "backends"
FEATURES: Final = "features"


def section_of(built: Any) -> Any:
    """Return the section that a factory was built from."""
    if isinstance(built, Factory):
        path = f"{built.target.__module__}.{built.target.__qualname__}"
        return {TARGET: path, PARTIAL: True} | {name: section_of(value) for name, value in built.values.items()}
    if isinstance(built, dict):
        return {name: section_of(value) for name, value in built.items()}
    return built


def backend_of_layer(attn: Section, layer: int) -> Section:
    """Return the section of the backend that a layer runs: of a pattern, the one named there."""
    while PATTERN in attn:
        attn = attn[BACKENDS][attn[PATTERN][layer % len(attn[PATTERN])]]
    return attn


def spell_pattern(
    layers: Sequence[Section], *, backends: Mapping[str, Section], features: Mapping[str, Section]
) -> str:
    """Return the words that give each layer its backend.

    Args:
        layers: the section of each layer's backend.
        backends: those that `attn=hybrid` has, by name.
        features: those that `attn/features=` has, by name.

    Raises:
        ValueError: for a backend or features that have no name there.
    """
    named: dict[str, Section] = {}
    pattern, words = [], []
    for layer in layers:
        name = next((name for name, known in named.items() if known == layer), None)
        if name is None:
            choice = _nearest(layer, backends, group="attn/hybrid.yaml's backends")
            name = next(each for each in (choice, *(f"{choice}_{n}" for n in range(2, 10**6))) if each not in named)
            named[name] = layer
            words += [] if name == choice else [f"+attn@attn.backends.{name}={choice}"]
            words += _spell(layer, backends[choice], place=f"attn.backends.{name}", features=features)
        pattern.append(name)
    return " ".join(["attn=hybrid", f"attn.pattern=[{','.join(pattern)}]", *words])


def _spell(wanted: Section, choice: Section, *, place: str, features: Mapping[str, Section]) -> Iterator[str]:
    """Yield the words that turn a choice at a place of the config into the section wanted."""
    if FEATURES in wanted:
        name = _nearest(wanted[FEATURES], features, group="task/hybrid.yaml's features")
        if name != _nearest(choice[FEATURES], features, group="task/hybrid.yaml's features"):
            yield f"attn/features@{place}.features={name}"
        choice = {**choice, FEATURES: features[name]}
    yield from (f"{key}={_word(value)}" for key, value in _differences(wanted, choice, place=place))


def _nearest(wanted: Section, choices: Mapping[str, Section], *, group: str) -> str:
    """Return the choice of the same classes from which a section differs least; the first of several."""
    fitting = [name for name, choice in choices.items() if choice[TARGET] == wanted[TARGET]]
    if not fitting:
        raise ValueError(f"no pattern can name {wanted[TARGET]}: it is none of configs/{group} ({', '.join(choices)})")
    alike = [name for name in fitting if _classes(choices[name]) == _classes(wanted)] or fitting[:1]
    return min(alike, key=lambda name: len([*_differences(wanted, choices[name], place="")]))


def _classes(section: Section) -> list[str]:
    inner = [_classes(value) for value in section.values() if isinstance(value, Mapping)]
    return [section[TARGET], *(name for names in inner for name in names)]


def _differences(wanted: Section, choice: Section, *, place: str) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each option that is another in the choice, or that it leaves out."""
    for name, value in wanted.items():
        if isinstance(value, Mapping) and isinstance(choice.get(name), Mapping):
            yield from _differences(value, choice[name], place=f"{place}.{name}")
        elif name not in choice:
            yield f"+{place}.{name}", value
        elif value != choice[name]:
            yield f"{place}.{name}", value


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
