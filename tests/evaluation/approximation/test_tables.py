import csv
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from performer_lm.evaluation.approximation.draws import Finding
from performer_lm.evaluation.approximation.layer import Approximation, Weights
from performer_lm.evaluation.approximation.pictures import draw_findings, draw_weights
from performer_lm.evaluation.approximation.tables import (
    spread_over_draws,
    sum_up,
    tabulate_draws,
    tabulate_heads,
    write_findings,
)


def measures(value: float) -> Approximation:
    """Two heads; the first is better than equal weights where the value is below 0.5."""
    both = torch.tensor([value, value + 0.2])
    return Approximation(
        *(torch.full((2,), 0.5) if name.startswith("uniform") else both for name in Approximation._fields)
    )


FINDINGS = [
    Finding("layer0", 8, None, measures(0.4)),
    *(Finding("layer0", count, draw, measures(0.1 * draw)) for count in (4, 16) for draw in (1, 3)),
    Finding("layer2", 8, None, measures(0.2)),
]


def test_the_spread_is_that_of_means_over_heads() -> None:
    spread = spread_over_draws(FINDINGS, "total_variation")
    assert list(spread) == ["layer0"]
    assert spread["layer0"][4].mean == pytest.approx(0.3)
    assert spread["layer0"][4].deviation == pytest.approx(0.02**0.5)


def test_the_file_has_a_line_per_layer_head_number_and_draw(tmp_path: Path) -> None:
    write_findings(FINDINGS, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(FINDINGS)
    assert list(rows[0]) == ["layer", "head", "num_features", "draw", *Approximation._fields]
    assert [rows[3][name] for name in ("layer", "head", "num_features", "draw")] == ["layer0", "1", "4", "1"]
    assert float(rows[3]["matrix_error"]) == pytest.approx(0.3)
    assert rows[0]["draw"] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_tables_say_what_was_found() -> None:
    out = io.StringIO()
    console = Console(file=out, width=160)
    console.print(tabulate_heads(FINDINGS), tabulate_draws(FINDINGS, "total_variation", title="sweep"))
    assert "0.300 ±0.141" in out.getvalue()
    assert out.getvalue().count("layer0") == 3  # two heads, and a line of the sweep
    assert sum_up(FINDINGS).startswith("3 of 4 heads come closer to softmax")


def test_a_single_draw_has_no_spread() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(tabulate_draws(FINDINGS[:2], "total_variation", title="sweep"))
    assert "±" not in out.getvalue()


@pytest.mark.parametrize("count", [1, 14])
def test_pictures_are_drawn(tmp_path: Path, count: int) -> None:
    layers = [finding._replace(layer=f"layer{index}") for index in range(count) for finding in FINDINGS[:5]]
    draw_findings(layers, tmp_path / "a.png", title="a")
    weights = Weights(*torch.rand(2, 1, 3, 9, 9).softmax(-1))
    draw_weights(weights, tmp_path / "b.png", heads=[0, 2], title="b")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
