"""A pattern that is printed can be typed: it builds the very backends that it was printed for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from performer_lm.building import build
from performer_lm.evaluation.patterns import backend_of_layer, section_of, spell_pattern

CONFIGS = Path(__file__).parents[2] / "configs"
SIGNED = {"trig"}  # features for models that are not causal, which no student is
Sections = dict[str, dict[str, Any]]


def composed(name: str, section: str, *words: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose(name, overrides=list(words))[section], resolve=True)
    return dict(plain)


@pytest.fixture(scope="module")
def choices() -> tuple[Sections, Sections]:
    """Return the backends and the features that `task=hybrid` knows by name."""
    task = composed("evaluate", "task", "task=hybrid", "attn=favor")
    return task["hybrid"]["backends"], task["features"]


def typed_back(layers: list[dict[str, Any]], choices: tuple[Sections, Sections]) -> list[Any]:
    """Return the backend of each layer of the model that is built of the words printed for `layers`."""
    words = spell_pattern(layers, backends=choices[0], features=choices[1]).split()
    attn = composed("train", "attn", *words)
    return [backend_of_layer(attn, layer) for layer in range(len(layers))]


def test_every_yaml_of_backends_and_features_has_its_name(choices: tuple[Sections, Sections]) -> None:
    backends, features = choices
    assert {*backends} == {path.stem for path in (CONFIGS / "attn").glob("*.yaml")} - {"hybrid"}
    assert {*features} == {path.stem for path in (CONFIGS / "attn" / "features").glob("*.yaml")} - SIGNED
    for name, backend in backends.items():
        words = spell_pattern([backend, backends["flash"]], backends=backends, features=features)
        assert words == f"attn=hybrid attn.pattern=[{name},flash]"
        for other, own in features.items():
            if "features" in backend:
                found = spell_pattern([{**backend, "features": own}], backends=backends, features=features)
                assert found.count("=") <= 4, f"{name} with {other}: {found}"


def test_every_backend_with_every_features_is_typed_back(choices: tuple[Sections, Sections]) -> None:
    backends, features = choices
    layers = [{**backends[name], "features": each} for name in ("favor", "delta") for each in features.values()]
    layers += [backend for backend in backends.values() if backend not in layers]
    assert typed_back(layers, choices) == layers


def changed(section: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a section with each of its options set to another value."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from ({**section, name: each} for each in changed(value))
        elif not name.startswith("_"):
            others: dict[type, Any] = {bool: value is False, str: "other", type(None): 3}
            yield {**section, name: others.get(type(value), 7)}


def test_every_option_is_typed_back(choices: tuple[Sections, Sections]) -> None:
    backends, features = choices
    layers = [each for name in ("favor", "delta", "local", "exact") for each in changed(backends[name])]
    layers += [{**backends["favor"], "features": each} for each in changed(features["learned"])]
    assert typed_back(layers, choices) == layers


def test_the_pattern_of_a_hybrid_is_that_of_its_layers(choices: tuple[Sections, Sections]) -> None:
    attn = composed("train", "attn", "attn=hybrid", "attn.pattern=[relu,local]", "attn.backends.local.window=9")
    layers = [backend_of_layer(attn, layer) for layer in range(3)]
    words = spell_pattern(layers, backends=choices[0], features=choices[1])
    assert words == "attn=hybrid attn.pattern=[relu,local,relu] attn.backends.local.window=9"


def test_a_factory_tells_the_section_it_was_built_from(choices: tuple[Sections, Sections]) -> None:
    backends, _ = choices
    assert section_of(build(backends)) == backends


def test_a_backend_without_a_name_is_refused_in_a_line(choices: tuple[Sections, Sections]) -> None:
    mine = {"_target_": "performer_lm.attention.mine.Mine", "_partial_": True}
    with pytest.raises(ValueError, match=r"no pattern can name performer_lm\.attention\.mine\.Mine") as refusal:
        spell_pattern([mine], backends=choices[0], features=choices[1])
    assert "\n" not in str(refusal.value)
