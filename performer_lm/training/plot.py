"""A run at a glance: loss, bits per byte, learning rates and throughput over its steps, in one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from performer_lm.writing import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, float]
Floats = NDArray[np.float64]
POINTS = 1000  # drawn of a line at most; more of them are averaged
BLUE, ORANGE, GREY = "#1f5fa8", "#d1682a", "#9aa3ad"


def draw_metrics(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw the rows of a record, one a step, to a PNG file, which is replaced in one move.

    Without pyplot: nothing outside the figure is touched.
    """
    from matplotlib.figure import Figure  # here, since it takes a while to import

    figure = Figure(figsize=(11, 6.5), dpi=110, layout="constrained")
    panels = {
        "loss (nats per token)": _loss,
        "validation bits per byte": _bits_per_byte,
        "learning rate": _rates,
        "tokens per second": _speed,
    }
    for axes, (name, draw) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        draw(axes, rows)
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    figure.supxlabel("step", fontsize=10)
    figure.suptitle(printable(title), fontsize=11, parse_math=False)
    write_png(path, figure)


def printable(text: str) -> str:
    """Return text that fonts can set: names of files may hold bytes that are no characters."""
    return text.encode("utf-8", "replace").decode()


def _loss(axes: "Axes", rows: Sequence[Row]) -> None:
    steps, train = _column(rows, "train/loss")
    if len(steps):
        axes.plot(*_thin(steps, train), color=GREY, linewidth=0.8, alpha=0.7)
        axes.plot(*_thin(steps, _smooth(train)), color=BLUE, linewidth=1.8, label="train, smoothed")
    steps, val = _column(rows, "val/loss")
    if len(steps):
        axes.plot(steps, val, color=ORANGE, marker=_marker(steps), markersize=4, linewidth=1.2, label="validation")


def _bits_per_byte(axes: "Axes", rows: Sequence[Row]) -> None:
    steps, bpb = _column(rows, "val/bpb")
    if len(steps):
        axes.plot(steps, bpb, color=ORANGE, marker=_marker(steps), markersize=4, linewidth=1.5)
        best = int(bpb.argmin())
        axes.plot(steps[best], bpb[best], marker="o", markersize=9, markerfacecolor="none", color=BLUE)
        label = f"best {bpb[best]:.4f} at step {steps[best]:,.0f}"
        axes.text(0.98, 0.94, label, transform=axes.transAxes, ha="right", va="top", color=BLUE)


def _rates(axes: "Axes", rows: Sequence[Row]) -> None:
    for name, label, color in (("lr", "AdamW", BLUE), ("lr_matrices", "Muon, matrices", ORANGE)):
        steps, rates = _column(rows, f"train/{name}")
        if len(steps):
            axes.plot(*_thin(steps, rates), color=color, linewidth=1.5, label=label)
    axes.set_ylim(bottom=0.0)


def _speed(axes: "Axes", rows: Sequence[Row]) -> None:
    steps, speed = _column(rows, "train/tokens_per_second")
    if len(steps):
        axes.plot(*_thin(steps, speed), color=BLUE, linewidth=1.2)
        median = float(np.median(speed))
        axes.axhline(median, color=GREY, linewidth=1.0, linestyle="--", label=f"median {median:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0.0)


def _marker(steps: Floats) -> str:
    """Return the mark of a point, none where they are many."""
    return "o" if len(steps) <= 40 else ""


def _column(rows: Sequence[Row], name: str) -> tuple[Floats, Floats]:
    """Return the steps at which a metric was logged, and its values."""
    found = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _smooth(values: Floats) -> Floats:
    """Return the means of windows of a twentieth of the points around each, shorter at the ends."""
    half = len(values) // 40
    sums = np.cumsum(np.concatenate(([0.0], values)))
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _thin(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Return at most `POINTS` points, each the mean of its neighbours."""
    if len(steps) <= POINTS:
        return steps, values
    pieces = np.array_split(np.arange(len(steps)), POINTS)
    return np.array([steps[piece].mean() for piece in pieces]), np.array([values[piece].mean() for piece in pieces])
