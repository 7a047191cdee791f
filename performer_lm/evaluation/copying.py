"""`evaluate.py task=copying`: how well models copy, by how far back a token's bigram last stood.

A bigram is a token and the one before it. Where the same two stood earlier in the window, the second can be copied from
there: by attention that finds the first. Letters: `b` batch, `n` predictions of a window, `k` buckets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.data.windows import IGNORE, FiniteWindows, segments_of, shown
from performer_lm.evaluation.base import (
    Evaluation,
    Subject,
    check_next_token,
    check_writable,
    print_table,
    spread_places,
)
from performer_lm.evaluation.buckets import POSITIONS, Buckets, as_array
from performer_lm.language_model import LanguageModel
from performer_lm.objectives import NextToken, shift
from performer_lm.ranges import Count, ranged
from performer_lm.writing import write_csv, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTANCES: Final = (1, 16, 64)
"""Where the first buckets of distances start."""
NEW: Final = "not yet"
GROUPS: Final = {"bigram": "where the bigram last stood, tokens back", "position": "position in the window"}
Numbers = NDArray[Any]


class Line(NamedTuple):
    """The losses of models on one bucket of tokens."""

    group: str  # all, or one of GROUPS
    bucket: str
    tokens: int
    share: float  # of all tokens
    losses: list[float]  # nats per token, of each model


@ranged
@final
class MeasureCopying(Evaluation):
    """Compare losses by how far back a token's bigram last stood in the window, and by position.

    Prints a table with a column for each checkpoint; writes `copying.csv` and `copying.png` into the run's folder.

    Args:
        against: other checkpoints of the same tokenizer, as `ckpt` names them.
        windows: of held-out text to look at, evenly spaced; None for all.
    """

    def __init__(self, *, against: list[str], windows: Count | None) -> None:
        self.against, self.windows = against, windows

    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Want a model that predicts each next token, the other checkpoints, and a folder to write to."""
        check_next_token(model, "task=copying")
        for name in self.against:
            checkpoint.find(name, key="task.against")
        check_writable(folder)

    def __call__(self, subject: Subject) -> float:
        """Return the loss of `ckpt` in nats per token."""
        data, (models, names) = subject.data, self._open(subject)
        options: Any = {"count": self.windows, "batch_size": data.batch_size, "separator": data.separator}
        lines = compare_copying(models, data.held_out, **options)
        paths = [subject.folder / f"copying.{kind}" for kind in ("csv", "png")]
        cells = ([*line[:3], *(f"{value:.6g}" for value in (line.share, *line.losses))] for line in lines)
        write_csv(paths[0], [*Line._fields[:4], *names], cells)
        draw_copying(lines, names, paths[1], title="loss by how far back a token's bigram last stood, and by position")
        rows = [
            [*line[:2], f"{line.tokens:,}", *(f"{value:.3f}" for value in (line.share, *line.losses))] for line in lines
        ]
        print_table("nats per token", ["", "", "tokens", "share", *names], rows, labels=2)
        print(*(f"wrote {path}" for path in paths), sep="\n")
        return lines[0].losses[0]

    def _open(self, subject: Subject) -> tuple[list[LanguageModel], list[str]]:
        """Return the models to compare, and their names.

        Raises:
            ValueError: for one of another tokenizer or objective.
        """
        models, paths = [subject.model], [subject.checkpoint.path]
        for name in self.against:
            file = checkpoint.read(checkpoint.find(name, key="task.against"))
            model, tokenizer = checkpoint.open_model(file)
            if tokenizer.to_dict() != subject.data.tokenizer.to_dict():
                raise ValueError(
                    f"task.against={name} has another tokenizer than {subject.checkpoint.path} "
                    f"({tokenizer.vocab_size} ids and {subject.data.tokenizer.vocab_size}): losses of tokens compare "
                    f"for one tokenizer alone"
                )
            check_next_token(model, "task=copying")
            models.append(model.to(subject.device))
            paths.append(file.path)
        return models, _tell_apart(paths)


def _tell_apart(paths: Sequence[Path]) -> list[str]:
    """Return a name for each checkpoint: as much of its run's path as differs from the others', else its own path."""
    runs = [checkpoint.holder(path).resolve().parts for path in paths]
    for length in range(1, max(map(len, runs)) + 1):
        names = ["/".join(run[-length:]) for run in runs]
        if len({*names}) == len(names):
            return names
    return [str(path) for path in paths]


@torch.inference_mode()
def compare_copying(
    models: Sequence[LanguageModel],
    windows: FiniteWindows,
    *,
    count: int | None = None,
    batch_size: int,
    separator: int | None = None,
) -> list[Line]:
    """Return the losses of models by bucket; a line for each that holds tokens, that of all tokens first.

    Args:
        models: in evaluation mode, on one device; they predict each next token.
        windows: of the text.
        count: how many of them to look at, evenly spaced; None for all.
        batch_size: windows at a time.
        separator: the id that begins a document where tokens see their own document only.

    Raises:
        ValueError: where there is nothing to predict.
        FloatingPointError: where a loss is not finite.
    """
    predict, device = NextToken(chunk_size=None), models[0].head.weight.device
    chosen = spread_places(windows, count)
    context = windows.rows(chosen[:1]).shape[1] - 1
    positions, distances = Buckets(POSITIONS, limit=context), Buckets(DISTANCES, limit=max(context, 2))
    labels = [("all", "all"), *(("position", label) for label in positions.labels)]
    labels += [("bigram", label) for label in (NEW, *distances.labels)]

    def add_up(places: Numbers, backs: Numbers, x: Numbers) -> NDArray[np.float64]:
        parts = ([x.sum()], positions.add_up(places, x), [x[backs == 0].sum()])
        return np.concatenate((*parts, distances.add_up(backs[backs > 0], x[backs > 0])))

    tokens, nats = np.zeros(len(labels)), np.zeros((len(models), len(labels)))
    for first in range(0, len(chosen), batch_size):
        rows = windows.rows(chosen[first : first + batch_size]).to(device)
        asked = shift(rows)[1] != IGNORE
        where = as_array(asked.nonzero()[:, 1]), as_array(bigram_distances(rows, separator)[asked])
        tokens += add_up(*where, np.ones(len(where[0])))
        for own, model in zip(nats, models, strict=True):
            own += add_up(*where, as_array(predict(model, rows, step=None, separator=separator).nats[asked]))
    if not tokens[0]:
        raise ValueError("the text is too short: there is no token in it to predict")
    if not np.isfinite(nats).all():
        raise FloatingPointError(f"the loss is not finite: {nats[:, 0].tolist()} nats over {int(tokens[0]):,} tokens")
    return [
        Line(*label, int(count), count / tokens[0], (sums / count).tolist())
        for label, count, sums in zip(labels, tokens.tolist(), nats.T, strict=True)
        if count
    ]


def bigram_distances(windows: Tensor, separator: int | None = None) -> Tensor:
    """Return how many tokens back each predicted token and the one before it last stood together, `(b, n)`; 0: never.

    Args:
        windows: `(b, n + 1)` ids, as data give them.
        separator: the id that begins a document where tokens see their own document only; None where they see all.
    """
    ids = torch.where(windows < IGNORE, shown(windows), windows)
    before, after = ids[:, :-1], ids[:, 1:]
    size = int(ids.max()) + 1
    pairs = before * size + after
    if separator is not None:
        pairs = pairs + segments_of(before, separator) * size * size
    pairs = torch.where((before < 0) | (after < 0), -1, pairs)
    ordered, places = pairs.sort(dim=1, stable=True)  # equal ones in the order they stand in
    steps = torch.where(ordered[:, 1:] == ordered[:, :-1], places.diff(dim=1), 0)
    return torch.zeros_like(pairs).scatter(1, places[:, 1:], steps)


def draw_copying(lines: Sequence[Line], names: Sequence[str], path: Path, *, title: str) -> None:
    """Draw losses by distance and by position, a line for each checkpoint; under a bucket stands its share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for axes, (group, label) in zip((left, right), GROUPS.items(), strict=True):
        _draw_group(axes, [line for line in lines if line.group == group], names)
        axes.set_xlabel(label, fontsize=9)
    left.set_ylabel("nats per token", fontsize=9)
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    write_png(path, figure)


def _draw_group(axes: "Axes", lines: Sequence[Line], names: Sequence[str]) -> None:
    places = range(len(lines))
    for index, name in enumerate(names):
        axes.plot(places, [line.losses[index] for line in lines], marker="o", markersize=4, linewidth=1.6, label=name)
    axes.set_xticks(places, [f"{line.bucket}\n{line.share:.0%}" for line in lines], fontsize=8)
    axes.margins(x=0.1)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
