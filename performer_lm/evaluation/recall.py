"""`evaluate.py task=recall`: a model trained on data=synthetic, asked for more than it was trained on.

An answer repeats an id that stands before it, its source. How much there is to recall (pairs, symbols), how long the
row is, and how deep in what was read the source lies are varied. Letters: `b` batch, `n` tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from performer_lm.data.synthetic.data import HELD_OUT, SyntheticData
from performer_lm.data.synthetic.tasks import Task
from performer_lm.evaluation.base import Evaluation, Subject, check_next_token, check_writable, print_table
from performer_lm.evaluation.buckets import as_array
from performer_lm.language_model import LanguageModel
from performer_lm.model import PerformerLM
from performer_lm.ranges import Count, ranged
from performer_lm.writing import write_csv, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGER: Final = (1, 2, 4, 8)  # as often as in training


class Cell(NamedTuple):
    """The share of right answers in rows of one kind."""

    grid: str  # size or depth
    row: str
    length: int
    answers: int
    accuracy: float


@ranged
@final
class MeasureRecall(Evaluation):
    """Print the share of right answers by length and size of a task, and by length and depth of what is asked for.

    Prints tables; writes `recall.csv` and `recall.png` into the run's folder.

    Args:
        lengths: of rows, in tokens; None for 1, 2, 4 and 8 times the trained one.
        sizes: pairs of `recall`, symbols of `selective_copy`; None for 1, 2, 4 and 8 times the trained one, as far as
            there are ids. The other tasks have none.
        depths: parts of what a model has read when it is asked, in which the answer may stand.
        rows: of each length and size.
    """

    def __init__(self, *, lengths: list[Count] | None, sizes: list[Count] | None, depths: Count, rows: Count) -> None:
        self.lengths, self.sizes, self.depths, self.rows = lengths, sizes, depths, rows

    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Want a model that predicts each next token, and a folder to write to."""
        check_next_token(model, "task=recall")
        check_writable(folder)

    def __call__(self, subject: Subject) -> float:
        """Return the accuracy of the first size or depth, at the first length.

        Raises:
            ValueError: for a model of text, or lengths and sizes of which no row can be made.
        """
        data = subject.data
        if not isinstance(data, SyntheticData):
            raise ValueError("task=recall asks a model that was trained on data=synthetic, and this one reads text")
        cells = [*self._measure(check_next_token(subject.model, "task=recall"), data)]
        title = f"share of right answers, {type(data.task).__name__}, trained on {data.context} tokens"
        title += f", size {data.task.size}" if data.task.size else ""
        paths = [subject.folder / f"recall.{kind}" for kind in ("csv", "png")]
        write_csv(paths[0], Cell._fields, ([*cell[:4], f"{cell.accuracy:.6g}"] for cell in cells))
        draw_cells(cells, paths[1], title=f"{subject.folder.resolve().name}: {title}")
        print(title)
        for grid, found in _grids(cells):
            rows, lengths, shares = _as_matrix(found)
            spelled = [["" if np.isnan(share) else f"{share:.1%}" for share in line] for line in shares]
            columns = [grid, *(f"{length} tokens" for length in lengths)]
            print_table(
                f"by {grid} and length", columns, ([row, *line] for row, line in zip(rows, spelled, strict=True))
            )
        print(*(f"wrote {path}" for path in paths), sep="\n")
        return cells[0].accuracy

    def _measure(self, model: PerformerLM, data: SyntheticData) -> Iterator[Cell]:
        lengths = self.lengths or [data.context * factor for factor in LONGER]
        own = data.task.size
        sizes = self.sizes or ([] if own is None else [own * factor for factor in LONGER])
        tasks = {size: task for size in sizes if (task := _resized(data.task, size, must=bool(self.sizes)))}
        for size, task in tasks.items():
            for length in lengths:
                if _fits(task, length):
                    right, _ = ask(model, task, length=length, rows=self.rows, at_once=_at_once(data, length))
                    yield Cell("size", str(size), length, len(right), float(right.mean()))
        if not any(_fits(task, length) for task in (*tasks.values(), data.task) for length in lengths):
            raise ValueError(f"task.lengths: {', '.join(map(str, lengths))} tokens are too few for a row of the task")
        for length in (length for length in lengths if _fits(data.task, length)):
            right, depths = ask(model, data.task, length=length, rows=self.rows, at_once=_at_once(data, length))
            parts = np.minimum(depths * self.depths, self.depths - 1).astype(np.int64)
            for part in range(self.depths):
                if (mine := right[parts == part]).size:
                    label = f"{part / self.depths:.2f}-{(part + 1) / self.depths:.2f}"
                    yield Cell("depth", label, length, len(mine), float(mine.mean()))


def _resized(task: Task, size: int, *, must: bool) -> Task | None:
    """Return a task of another size; None where there are too few ids for it and it need not be."""
    try:
        return task.resized(size)
    except ValueError as error:
        if must:
            raise ValueError(f"task.sizes: {error}") from error
        return None


def _fits(task: Task, length: int) -> bool:
    try:
        task.check(context=length)
    except ValueError:
        return False
    return True


def _at_once(data: SyntheticData, length: int) -> int:
    """Return how many rows hold about as many tokens as a batch of training."""
    return max(1, data.batch_size * data.context // length)


@torch.inference_mode()
def ask(
    model: PerformerLM, task: Task, *, length: int, rows: int, at_once: int
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return for every answer in some rows whether a model knows it, and how deep its source lies, `(t,)` each.

    Depth is the place of the source over that of the answer: 0 at the start of the row, 1 just before the answer.
    """
    right, depths = [], []
    for first in range(0, rows, at_once):
        randoms = [np.random.default_rng([HELD_OUT, length, row]) for row in range(first, min(first + at_once, rows))]
        drawn = [task.draw(random, count=1, context=length) for random in randoms]
        ids, sources = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        tokens = torch.from_numpy(ids).to(model.head.weight.device)
        asked = torch.from_numpy(sources[:, 1:] >= 0).to(tokens.device)
        likeliest = model.head(model.hidden(tokens[:, :-1])[asked]).argmax(-1)
        right.append(as_array(likeliest == tokens[:, 1:][asked]))
        where = np.nonzero(sources >= 0)
        depths.append(sources[where] / where[1])
    return np.concatenate(right), np.concatenate(depths)


def _grids(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    return [(grid, [*found]) for grid, found in groupby(cells, key=lambda cell: cell.grid)]


def _as_matrix(cells: Sequence[Cell]) -> tuple[list[str], list[int], NDArray[np.float64]]:
    """Return the labels of rows and columns of a grid, and its accuracies, NaN where nothing was asked."""
    rows = sorted({cell.row for cell in cells}, key=lambda row: float(row.partition("-")[0]))
    lengths = sorted({cell.length for cell in cells})
    found = np.full((len(rows), len(lengths)), np.nan)
    for cell in cells:
        found[rows.index(cell.row), lengths.index(cell.length)] = cell.accuracy
    return rows, lengths, found


def draw_cells(cells: Sequence[Cell], path: Path, *, title: str) -> None:
    """Draw a heat map of each grid."""
    from matplotlib.figure import Figure

    grids = _grids(cells)
    figure = Figure(figsize=(1.2 + 4.6 * len(grids), 4.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (grid, found) in zip(panels, grids, strict=True):
        image = _draw_grid(axes, found)
        axes.set_ylabel({"size": "size (pairs, symbols)", "depth": "depth of the answer's source"}[grid], fontsize=9)
        axes.set_xlabel("length of the row, tokens", fontsize=9)
    figure.colorbar(image, ax=list(panels), shrink=0.85, label="share of right answers")
    figure.suptitle(title, fontsize=10)
    write_png(path, figure)


def _draw_grid(axes: "Axes", cells: Sequence[Cell]) -> Any:
    rows, lengths, found = _as_matrix(cells)
    image = axes.imshow(found, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(lengths)), map(str, lengths), fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for (row, column), value in np.ndenumerate(found):
        if not np.isnan(value):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=8)
    return image
