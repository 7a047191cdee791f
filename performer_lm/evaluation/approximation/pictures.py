"""Pictures of an approximation: how it improves with more features, and attention matrices beside softmax's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from performer_lm.evaluation.approximation.draws import Finding
from performer_lm.evaluation.approximation.layer import Weights
from performer_lm.evaluation.approximation.tables import as_it_is, spread_over_draws
from performer_lm.writing import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 12  # layers that a legend can hold
PANELS = {
    "relative_error": "relative error of the output",
    "matrix_error": "relative error of the attention matrix",
    "total_variation": "total variation (dashed: equal weights)",
    "effective_features": "effective features (dotted: all m)",
}


def draw_findings(findings: Sequence[Finding], path: Path, *, title: str) -> None:
    """Draw the measures against the number of features: a line per layer, its spread over draws, a star as it is."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), dpi=100, layout="constrained")
    own = {finding.layer: finding for finding in as_it_is(findings)}
    colours = dict(zip(own, colormaps["viridis"](np.linspace(0.0, 0.9, len(own))), strict=True))
    for axes, (measure, name) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS.items(), strict=True):
        _lines(axes, findings, measure, colours)
        for layer, finding in own.items():
            value = float(getattr(finding.measures, measure).mean())
            label = layer if measure == "relative_error" and len(own) <= NAMED else None
            star = {"marker": "*", "markersize": 12, "markeredgecolor": "white", "linestyle": "", "zorder": 3}
            axes.plot([finding.num_features], [value], color=colours[layer], label=label, **star)
            if measure == "total_variation":
                equal = float(finding.measures.uniform_total_variation.mean())
                axes.axhline(equal, color=colours[layer], linestyle="--", linewidth=0.9, alpha=0.7)
        _dress(axes, name, is_log=measure != "total_variation")
    figure.axes[2].set_ylim(0.0, None)
    ends = np.array(figure.axes[3].get_xlim())
    figure.axes[3].plot(ends, ends, color="grey", linestyle=":", linewidth=1.0)
    figure.axes[3].set_xlim(*ends)
    if len(own) <= NAMED:
        figure.axes[0].legend(frameon=False, fontsize=9)
    figure.supxlabel("number of features m (a star: as the model runs them)", fontsize=10)
    figure.suptitle(title, fontsize=11)
    write_png(path, figure)


def _lines(axes: "Axes", findings: Sequence[Finding], measure: str, colours: Mapping[str, Any]) -> None:
    for layer, spreads in spread_over_draws(findings, measure).items():
        counts = sorted(spreads)
        means = np.array([spreads[count].mean for count in counts])
        width = np.nan_to_num([spreads[count].deviation for count in counts])
        axes.plot(counts, means, color=colours[layer], linewidth=1.6, marker="o", markersize=3.5)
        low = np.maximum(means - width, 0.2 * means)  # a logarithmic axis has no zero
        axes.fill_between(counts, low, means + width, color=colours[layer], alpha=0.2, linewidth=0)


def _dress(axes: "Axes", name: str, *, is_log: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw_weights(weights: Weights, path: Path, *, heads: Sequence[int], title: str) -> None:
    """Draw the matrix that features imply, softmax's, and their difference, a row a head, for the batch's first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 0.6 + 2.9 * len(heads)), dpi=100, layout="constrained")
    rows = figure.subplots(len(heads), 3, squeeze=False, sharex=True, sharey=True)
    for row, head in zip(rows, heads, strict=True):
        implied, exact = (matrix[0, head].cpu().double().numpy() for matrix in weights)
        _draw_head(figure, row, implied, exact)
        row[0].set_ylabel(f"head {head}\nquery", fontsize=9)
    for axes, name in zip(rows[0], ("random features", "softmax", "difference"), strict=True):
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
    for axes in rows[-1]:
        axes.set_xlabel("key", fontsize=9)
    figure.suptitle(title, fontsize=11)
    write_png(path, figure)


def _draw_head(figure: "Figure", row: Any, implied: NDArray[np.float64], exact: NDArray[np.float64]) -> None:
    """Draw one head on three axes; the roots of weights are coloured, so that small ones can be seen."""
    from matplotlib.colors import PowerNorm, SymLogNorm

    high = max(float(np.quantile(exact.max(axis=1), 0.9)), 1e-6)
    norm = PowerNorm(0.5, vmin=0.0, vmax=high, clip=True)
    options = {"interpolation": "nearest", "aspect": "equal"}
    for axes, matrix in zip(row, (implied, exact), strict=False):
        image = axes.imshow(matrix, cmap="magma", norm=norm, **options)
    _bar(figure, row[1], image, [0.0, 0.05 * high, 0.25 * high, high])
    signed = SymLogNorm(linthresh=high / 20, vmin=-high, vmax=high, clip=True)
    image = row[2].imshow(implied - exact, cmap="RdBu_r", norm=signed, **options)
    _bar(figure, row[2], image, [-high, -0.1 * high, 0.0, 0.1 * high, high])


def _bar(figure: "Figure", axes: "Axes", image: Any, ticks: Sequence[float]) -> None:
    """Add a bar of colours to an image; values beyond the last of them have its colour."""
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_ticks(list(ticks), labels=[f"{tick:.2g}" for tick in ticks], minor=False)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
