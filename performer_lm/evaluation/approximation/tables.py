"""The errors of random features, as tables for people and as a csv file for other programs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from performer_lm.evaluation.approximation.draws import Finding
from performer_lm.evaluation.approximation.layer import Approximation
from performer_lm.writing import write_csv


class Spread(NamedTuple):
    """A measure over several draws of as many features."""

    mean: float
    deviation: float
    """Standard deviation from draw to draw; not a number of a single one."""


def spread_over_draws(findings: Sequence[Finding], measure: str) -> dict[str, dict[int, Spread]]:
    """Return by layer and number of features a measure's mean over heads, and how it varies with the draw."""
    drawn = [finding for finding in findings if finding.draw is not None]
    found: dict[str, dict[int, Spread]] = {}
    for layer, count in dict.fromkeys((finding.layer, finding.num_features) for finding in drawn):
        same = [each.measures for each in drawn if (each.layer, each.num_features) == (layer, count)]
        values = torch.stack([getattr(measures, measure).cpu().double().mean() for measures in same])
        deviation = float(values.std()) if len(values) > 1 else float("nan")
        found.setdefault(layer, {})[count] = Spread(float(values.mean()), deviation)
    return found


def as_it_is(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings of the features that the model runs, one a layer."""
    return [finding for finding in findings if finding.draw is None]


def write_findings(findings: Sequence[Finding], path: Path) -> None:
    """Write a csv line per layer, head, number of features and draw; `draw` is empty for the model's own."""
    write_csv(path, ["layer", "head", "num_features", "draw", *Approximation._fields], _lines(findings))


def _lines(findings: Sequence[Finding]) -> Iterator[list[object]]:
    for layer, count, draw, measures in findings:
        for head, values in enumerate(zip(*(measure.tolist() for measure in measures), strict=True)):
            yield [layer, head, count, "" if draw is None else draw, *(f"{value:.6g}" for value in values)]


COLUMNS: dict[str, Callable[[Approximation], Tensor]] = {
    "output error": lambda found: found.relative_error,
    "matrix error": lambda found: found.matrix_error,
    "total variation": lambda found: found.total_variation,
    "equal weights": lambda found: found.uniform_total_variation,
    "effective m": lambda found: found.effective_features,
    "|q|": lambda found: found.query_norm,
    "|k|": lambda found: found.key_norm,
}


def tabulate_heads(findings: Sequence[Finding]) -> Table:
    """Return a line per layer and head of the features that the model runs; in green those that beat equal weights."""
    shown = Table(title="random features against softmax, as the model runs them", title_justify="left")
    for name in ("layer", "head", "m", *COLUMNS):
        shown.add_column(name, justify="left" if name == "layer" else "right")
    for finding in as_it_is(findings):
        measures = finding.measures
        columns = [column(measures).tolist() for column in COLUMNS.values()]
        better = (measures.total_variation < measures.uniform_total_variation).tolist()
        for head, values in enumerate(zip(*columns, strict=True)):
            cells = [f"{value:.1f}" if value >= 10 else f"{value:.3f}" for value in values]
            style = "green" if better[head] else None
            shown.add_row(finding.layer, str(head), str(finding.num_features), *cells, style=style)
        shown.add_section()
    return shown


def tabulate_draws(findings: Sequence[Finding], measure: str, *, title: str) -> Table:
    """Return a line per layer, a column per number of features: the mean over heads and draws, and its spread."""
    found = spread_over_draws(findings, measure)
    counts = sorted({count for layer in found.values() for count in layer})
    shown = Table(title=title, title_justify="left")
    shown.add_column("layer")
    for count in counts:
        shown.add_column(f"m = {count}", justify="right")
    for layer, cells in found.items():
        shown.add_row(layer, *(_spell(cells[count]) for count in counts))
    return shown


def _spell(spread: Spread) -> str:
    return f"{spread.mean:.3f}" + (f" ±{spread.deviation:.3f}" if spread.deviation == spread.deviation else "")


def sum_up(findings: Sequence[Finding]) -> str:
    """Return one line: in how many heads features know more of softmax than equal weights do."""
    own = [finding.measures for finding in as_it_is(findings)]
    better = sum(int((found.total_variation < found.uniform_total_variation).sum()) for found in own)
    heads = sum(len(found.total_variation) for found in own)
    error = torch.cat([found.relative_error for found in own]).median()
    return f"{better} of {heads} heads come closer to softmax than equal weights do; median error of output {error:.2f}"
