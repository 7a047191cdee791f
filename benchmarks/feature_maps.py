"""How close each feature map for softmax comes to it, on vectors whose statistics are known.

    python benchmarks/feature_maps.py

Under a minute on one core. Draws queries, keys and projections of width 32 a hundred times and compares, for 16 to 512
features, the attention matrix (total variation from softmax, averaged over queries) and the kernel (root mean square of
the relative error, over pairs). What a map knows of its data (A, centres, axes) is taken over all draws together, as
running averages take it over a run. Writes results/feature_maps.json and feature_maps.png, and prints tables.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import torch
from measure import RESULTS, THREADS, write_results
from PIL import Image
from torch import Tensor

from performer_lm.ops.maps import Exponential, Taylor, optimal_damping
from performer_lm.ops.projections import draw_projection, haar

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

DIM, TOKENS, DRAWS = 32, 64, 100
COUNTS = [16, 32, 64, 128, 256, 512]
TAYLOR_COUNT = 1 + DIM + DIM * (DIM + 1) // 2  # all of its features
SHOWN = 128  # features of the printed tables


class Vectors(NamedTuple):
    """Scaled queries x = q d^-1/4 and keys y = k d^-1/4, `(draws, n, d)`: the kernel is exp(x.y)."""

    x: Tensor
    y: Tensor


def sample(mean_square: float, *, offset: float = 0.0, slope: float = 0.0) -> Vectors:
    """Draw Gaussian vectors whose |x + y|^2 is `mean_square` on average.

    Args:
        mean_square: of x + y, the offset's part included.
        offset: the part of it that comes from a mean, which queries and keys share.
        slope: how fast the variance of a query's coordinates falls, as exp(-slope l); keys' are all the same.
    """
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(DRAWS, TOKENS, DIM, generator=random, dtype=torch.float64) for _ in range(2))
    profile = torch.exp(-slope * torch.arange(DIM, dtype=torch.float64))
    variance = (mean_square - offset) / (2 * DIM)
    mean = torch.randn(DIM, generator=random, dtype=torch.float64)
    mean = mean * (math.sqrt(offset) / 2 / mean.norm())  # of x and of y, so that x + y has twice of it
    return Vectors(x * (variance * profile / profile.mean()).sqrt() + mean, y * math.sqrt(variance) + mean)


SAMPLES = {f"{size}": sample(size) for size in (1, 4, 12)}  # by |x + y|^2
SAMPLES |= {"12, off centre": sample(12, offset=8), "12, uneven": sample(12, slope=0.2)}


def random_features(
    vectors: Vectors,
    count: int,
    *,
    coupling: str = "orthogonal",
    regularized: bool = False,
    antithetic: bool = False,
    damping: Tensor | float = 0.0,
) -> Tensor:
    """Estimate log exp(x.y) by exp(A |w|^2 + B w.x - |x|^2 / 2), `(draws, n, n)`.

    `damping` is A: a number, or one for each coordinate `(d,)`, which turns A |w|^2 into sum A_l w_l^2.
    """
    rows = draw_projection(
        DRAWS, count // 2 if antithetic else count, DIM, seed=1, coupling=coupling, regularized=regularized
    ).double()
    rows = torch.cat([rows, -rows], dim=1) if antithetic else rows
    a = torch.as_tensor(damping, dtype=torch.float64).expand(DIM)
    features = Exponential((rows * (1.0 - 4.0 * a).sqrt(), rows.square() @ a), norm=0.5)
    x, y = (features(each).log_scale + features.gain(each)[..., None] for each in vectors)
    constant = 0.5 * float((1.0 - 4.0 * a).log().sum()) - math.log(count)
    x_peak, y_peak = (logs.amax(dim=-1, keepdim=True) for logs in (x, y))
    return ((x - x_peak).exp() @ (y - y_peak).exp().mT).log() + x_peak + y_peak.mT + constant


def optimal(vectors: Vectors, count: int) -> Tensor:
    """Estimate by FAVOR++ (2205.15317): one A for all coordinates, from the mean of |x_i + y_j|^2."""
    x, y = vectors
    square = x.square().sum(-1).mean() + y.square().sum(-1).mean() + 2.0 * x.mean((0, 1)) @ y.mean((0, 1))
    return random_features(vectors, count, antithetic=True, damping=optimal_damping(square, DIM))


def centred(vectors: Vectors, count: int, *, estimate: Callable[[Vectors, int], Tensor]) -> Tensor:
    """Estimate by vectors less their means, a and b, whose part x.b + y.a - a.b of x.y is known."""
    x, y = vectors
    a, b = x.mean((0, 1)), y.mean((0, 1))
    return estimate(Vectors(x - a, y - b), count) + (x @ b)[..., None] + (y @ a)[..., None, :] - a @ b


def balanced(vectors: Vectors, count: int) -> Tensor:
    """Estimate by FAVOR# with a diagonal (SADERF, 2302.00787): Psi x and y / Psi, which are short together."""
    x, y = vectors
    psi = (y.square().mean((0, 1)) / x.square().mean((0, 1))) ** 0.25
    return optimal(Vectors(psi * x, y / psi), count)


def along_axes(vectors: Vectors, count: int) -> Tensor:
    """Estimate by FAVOR# with a symmetric A (SDERF, 2302.00787): an optimal A for each principal axis of x + y."""
    x, y = vectors
    means = torch.outer(x.mean((0, 1)), y.mean((0, 1)))
    moments = sum(each.flatten(0, 1).T @ each.flatten(0, 1) / (DRAWS * TOKENS) for each in vectors)
    spread, axes = torch.linalg.eigh(moments + means + means.T)
    damping = optimal_damping(spread.clamp(min=0.0), 1)
    return random_features(Vectors(x @ axes, y @ axes), count, antithetic=True, damping=damping)


def taylor(vectors: Vectors, count: int) -> Tensor:
    """Estimate by 1 + s + s^2 / 2 of as many random directions as fit in `count` features, as `taylor2` starts."""
    width = max(w for w in range(1, DIM + 1) if 1 + w + w * (w + 1) // 2 <= count)
    axes = haar(DRAWS, DIM, generator=torch.Generator().manual_seed(1))[:, :width] * math.sqrt(DIM / width)
    features = Taylor((axes,) if width < DIM else ())
    x, y = (features(each).values for each in vectors)
    return (x @ y.mT).log()


positive = random_features
EQUAL = "equal weights"
MAPS: dict[str, Callable[[Vectors, int], Tensor]] = {
    "positive, iid": partial(positive, coupling="iid"),
    "positive": positive,
    "positive, simplex": partial(positive, coupling="simplex"),
    "positive, regularized": partial(positive, regularized=True),
    "positive, centred": partial(centred, estimate=positive),
    "hyperbolic": partial(positive, antithetic=True),
    "optimal": optimal,
    "optimal, centred": partial(centred, estimate=optimal),
    "FAVOR# diagonal": balanced,
    "FAVOR# symmetric": along_axes,
    "taylor2": taylor,
}
LINES = ["b:", "b-", "c-", "m-", "b--", "y-", "r-", "r--", "g-", "g--", "k-"]  # a colour for a family


class Mean(NamedTuple):
    """A mean over draws and its standard error."""

    mean: float
    error: float


def average(values: Tensor) -> Mean:
    """Average what each draw gave, `(draws,)`."""
    return Mean(float(values.mean()), float(values.std() / DRAWS**0.5))


def variation(logs: Tensor, exact: Tensor) -> Mean:
    """Return the total variation between rows of weights that these log kernels give."""
    return average(0.5 * (logs.softmax(-1) - exact.softmax(-1)).abs().sum(-1).mean(-1))


def kernel_error(logs: Tensor, exact: Tensor) -> Mean:
    """Return the relative error of the kernel itself, root mean square over the pairs of a draw."""
    return average((logs - exact).expm1().square().mean((-2, -1)).sqrt())


MEASURES = {"total_variation": variation, "kernel_error": kernel_error}
Found = dict[str, dict[int, dict[str, Mean]]]  # of a map and a number of features, every measure


def measure(vectors: Vectors) -> Found:
    """Measure all maps on one sample."""
    exact = vectors.x @ vectors.y.mT
    found: Found = {EQUAL: {0: {"total_variation": variation(torch.zeros_like(exact), exact)}}}
    for name, estimate in MAPS.items():
        found[name] = {}
        for count in [*COUNTS, TAYLOR_COUNT] if estimate is taylor else COUNTS:
            logs = estimate(vectors, count)
            found[name][count] = {key: of(logs, exact) for key, of in MEASURES.items()}
    return found


def tell(found: dict[str, Found], key: str) -> None:
    """Print one measure at `SHOWN` features: a line per map, a column per sample."""
    print(f"\n{key}, m = {SHOWN}, ± standard error over {DRAWS} draws\n{'':22}", *(f"{name:>16}" for name in SAMPLES))
    lines = [(name, SHOWN, name) for name in MAPS] + [("taylor2", TAYLOR_COUNT, f"taylor2, m = {TAYLOR_COUNT}")]
    for name, count, label in [(EQUAL, 0, EQUAL), *lines] if key == "total_variation" else lines:
        figures = [maps[name][count][key] for maps in found.values()]
        print(f"{label:22}", *(f"{figure.mean:8.3f} ± {figure.error:5.3f}" for figure in figures))


def tabulate(found: dict[str, Found]) -> list[dict[str, Any]]:
    """Return all figures as rows for a file: a row per sample and map, its lists over the number of features."""

    def lists(figures: list[Mean]) -> dict[str, list[float]]:
        return {part: [float(f"{getattr(figure, part):.4g}") for figure in figures] for part in Mean._fields}

    rows: list[dict[str, Any]] = []
    for sample_name, maps in found.items():
        for name, counts in maps.items():
            keys = next(iter(counts.values()))
            measures = {key: lists([figures[key] for figures in counts.values()]) for key in keys}
            rows.append({"vectors": sample_name, "map": name, "features": [*counts], **measures})
    return rows


def plot(found: dict[str, Found]) -> None:
    """Draw both measures over the number of features, a column per sample."""
    figure, panels = plt.subplots(2, len(SAMPLES), figsize=(14, 5.2), layout="constrained", sharex=True)
    for column, (name, maps) in enumerate(found.items()):
        for axes, key in zip(panels[:, column], MEASURES, strict=True):
            for place, (label, line) in enumerate(zip(MAPS, LINES, strict=True)):
                points = [(count, figures[key].mean) for count, figures in maps[label].items()]
                style = {"linewidth": 1.2 + 0.2 * place, "zorder": -place}  # so that lines on one another are seen
                axes.plot(*zip(*points, strict=True), line, **style, label=label)
            axes.loglog()
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xticks(COUNTS[::2], COUNTS[::2])
            axes.minorticks_off()
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        equal = maps[EQUAL][0]["total_variation"].mean
        panels[0, column].axhline(equal, color="grey", linestyle=":", linewidth=1.5, label=EQUAL)
        panels[0, column].set_title(f"|x + y|² = {name}", fontsize=10, loc="left")
        panels[0, column].set_ylim(max(0.004, panels[0, column].get_ylim()[0]), None)
    panels[0, 0].set_ylabel("total variation from softmax")
    panels[1, 0].set_ylabel("relative error of the kernel")
    figure.supxlabel("number of features m", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    path = RESULTS / "feature_maps.png"
    figure.savefig(path, dpi=80)
    Image.open(path).quantize(48).save(path, optimize=True)


def main() -> None:
    """Measure, print, write, draw."""
    torch.set_num_threads(THREADS)
    found = {name: measure(vectors) for name, vectors in SAMPLES.items()}
    for key in MEASURES:
        tell(found, key)
    write_results("feature_maps", {"dim": DIM, "tokens": TOKENS, "draws": DRAWS, "rows": tabulate(found)})
    plot(found)


if __name__ == "__main__":
    main()
