"""A backend that is typed where the checkpoint has it already changes what is typed alone."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from performer_lm.checkpoint.backend import with_backend

Section = Callable[..., dict[str, Any]]
CHOICES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "attn").glob("*.yaml"))
FEATURES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "attn" / "features").glob("*.yaml"))


def changed(section: Any) -> Any:
    """Return a section that builds the same classes of other values."""
    if isinstance(section, dict):
        return {name: value if name.startswith("_") else changed(value) for name, value in section.items()}
    return f"not {section!r}"


def leaves(section: Any, path: str = "attn") -> dict[str, Any]:
    """Return the values of a section by path."""
    if not isinstance(section, dict):
        return {path: section}
    inner = [leaves(value, f"{path}.{name}") for name, value in section.items() if not name.startswith("_")]
    return {place: value for each in inner for place, value in each.items()}


@pytest.fixture(scope="module")
def backends(model_section: Section) -> dict[str, dict[str, Any]]:
    """Return the section of each backend, as `attn=NAME` composes it."""
    return {name: model_section(f"attn={name}")["attn"] for name in CHOICES}


@pytest.mark.parametrize("name", CHOICES)
def test_a_backend_opened_by_its_own_name_is_the_one_that_was_trained(backends: dict[str, Any], name: str) -> None:
    attn = backends[name]
    section = {"dim": 8, "encoder": {"attn": changed(attn)}, "decoder": {"attn": attn}}
    assert with_backend(section, attn, typed=["attn"]) == section


@pytest.mark.parametrize("name", CHOICES)
def test_of_a_backend_that_is_there_already_the_options_typed_change_alone(backends: dict[str, Any], name: str) -> None:
    attn = backends[name]
    own, today = leaves(changed(attn)), leaves(attn)
    for path in own:
        found = with_backend({"attn": changed(attn)}, attn, typed=["attn", path])["attn"]
        assert leaves(found) == {**own, path: today[path]}


@pytest.mark.parametrize(
    ("name", "features"),
    [
        *(("delta", name) for name in FEATURES),
        *(("favor", name) for name in FEATURES if name not in ("generalized", "identity")),  # attn=relu, attn=linear
    ],
)
def test_features_stay_where_the_backend_alone_was_typed(model_section: Section, name: str, features: str) -> None:
    own = changed(model_section(f"attn={name}", f"attn/features={features}")["attn"])
    typed = model_section(f"attn={name}")["attn"]
    assert with_backend({"attn": own}, typed, typed=["attn"])["attn"] == own
    other = model_section(f"attn={name}", "attn/features=taylor2")["attn"]
    found = with_backend({"attn": own}, other, typed=["attn", "attn.features"])["attn"]
    assert found == {**own, "features": other["features"]}


def test_another_backend_comes_with_all_of_its_options(backends: dict[str, Any]) -> None:
    for own, typed in permutations(CHOICES, 2):
        section = {"dim": 8, "attn": changed(backends[own])}
        assert with_backend(section, backends[typed], typed=["attn"]) == {"dim": 8, "attn": backends[typed]}


def test_a_pattern_that_is_typed_may_name_backends_that_the_checkpoint_did_not_know(model_section: Section) -> None:
    attn = model_section("attn=hybrid", "attn.pattern=[delta]")["attn"]
    own = changed(attn)
    del own["backends"]["delta"]
    found = with_backend({"attn": own}, attn, typed=["attn", "attn.pattern"])["attn"]
    assert found == {**own, "pattern": ["delta"], "backends": {**own["backends"], "delta": attn["backends"]["delta"]}}


def test_a_section_that_nobody_typed_counts_as_it_is(model_section: Section) -> None:
    attn = model_section("attn=favor")["attn"]
    assert with_backend({"attn": changed(attn)}, attn) == {"attn": attn}
    assert with_backend({"attn": 3}, attn, typed=["attn"]) == {"attn": attn}
