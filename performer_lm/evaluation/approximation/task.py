"""`evaluate.py task=approximation`: a trained model's random features against softmax of its own queries and keys.

Letters: `b` batch, `h` heads, `i` queries, `j` keys, `m` features, `n` tokens.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from performer_lm.attention.base import parts_of
from performer_lm.attention.favor import FavorAttention
from performer_lm.evaluation.approximation.draws import Finding, count_measurements, is_drawn, measure_draws, redrawn
from performer_lm.evaluation.approximation.layer import Weights, materialise_weights
from performer_lm.evaluation.approximation.model import Vectors, favor_layers, watch
from performer_lm.evaluation.approximation.pictures import draw_findings, draw_weights
from performer_lm.evaluation.approximation.tables import (
    as_it_is,
    sum_up,
    tabulate_draws,
    tabulate_heads,
    write_findings,
)
from performer_lm.evaluation.base import Evaluation, Subject, check_writable, open_console, pick_windows
from performer_lm.language_model import LanguageModel
from performer_lm.ranges import Count, Whole, ranged

DRAWN = 4  # heads of a layer that are drawn where nobody chose


@ranged
@final
class MeasureApproximation(Evaluation):
    """Compare FAVOR with exact attention in every layer that runs it, and sweep the number of features.

    Prints a table per head and one over the sweep; writes `approximation.csv`, `approximation.png` and `attention.png`
    into the run's folder.

    Args:
        num_features: numbers of features to compare; an empty list measures the model as it is.
        redraws: projections to draw for each of them.
        sequences: windows of held-out text to look at.
        queries: tokens of each whose attention is compared, evenly spaced; None for all.
        layer: whose attention matrices are drawn, by number or name; None for the first that runs FAVOR.
        heads: whose of that layer; None for the first four.
        tokens: of a window, whose attention is drawn.
    """

    def __init__(
        self,
        *,
        num_features: list[Count],
        redraws: Count,
        sequences: Count,
        queries: Count | None,
        layer: Whole | str | None,
        heads: list[Whole] | None,
        tokens: Count,
    ) -> None:
        self.num_features, self.redraws = sorted(set(num_features)), redraws
        self.sequences, self.queries, self.tokens = sequences, queries, tokens
        self.layer, self.heads = layer, heads

    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Want a model with FAVOR layers, the chosen one and its heads among them, and a folder to write to."""
        layers = favor_layers(model)
        if not layers:
            kinds = sorted({f"attn={each.choice}" for each in parts_of(model)})
            raise ValueError(
                f"task=approximation compares random features with softmax, and this model runs none "
                f"({', '.join(kinds)}); attn=favor opens the same weights with random features"
            )
        self._chosen_heads(layers[self._chosen_layer(list(layers))])
        for attention in layers.values():
            for count in self.num_features if is_drawn(attention) else ():
                redrawn(attention, num_features=count, index=0)
        check_writable(folder)

    def __call__(self, subject: Subject) -> float:
        """Return the total variation from softmax of the features that the model runs, mean over layers and heads."""
        windows = pick_windows(subject.data.held_out, self.sequences).to(subject.device)
        console = open_console()
        findings = self._sweep(subject, windows, console)
        weights = self._materialise(subject, windows[:1, : self.tokens + 1])
        written = list(self._write(findings, weights, subject))  # first, for a reader of the tables may go away
        self._tell(findings, console)
        for path in written:
            console.print(f"wrote {path}", soft_wrap=True)
        own = torch.cat([finding.measures.total_variation for finding in as_it_is(findings)])
        return float(own.mean())

    def _sweep(self, subject: Subject, windows: Tensor, console: Console) -> list[Finding]:
        total = count_measurements(subject.model, num_features=self.num_features, redraws=self.redraws)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("comparing", total=total)
            return measure_draws(
                subject.model,
                lambda: ask(subject, windows),
                num_features=self.num_features,
                redraws=self.redraws,
                queries=self.queries,
                advance=lambda: progress.advance(task),
            )

    def _materialise(self, subject: Subject, windows: Tensor) -> Weights:
        """Return the attention matrices of the chosen layer on one window."""
        chosen = self._chosen_layer(list(favor_layers(subject.model)))
        found: list[Weights] = []

        def look(layer: str, attention: FavorAttention, vectors: Vectors, more: dict[str, Any]) -> None:
            if layer == chosen:
                found.append(materialise_weights(attention, *vectors[:2], **more))

        watch(subject.model, look, lambda: ask(subject, windows))
        return found[0]

    def _tell(self, findings: Sequence[Finding], console: Console) -> None:
        console.print(tabulate_heads(findings))
        if any(finding.draw is not None for finding in findings):
            title = f"total variation from softmax, mean over heads, ± its spread over {self.redraws} draws"
            console.print(tabulate_draws(findings, "total_variation", title=title))
        elif self.num_features:
            console.print("these features are not drawn at random: there is nothing to sweep")
        console.print(sum_up(findings))

    def _write(self, findings: Sequence[Finding], weights: Weights, subject: Subject) -> Iterator[Path]:
        layers = favor_layers(subject.model)
        layer = self._chosen_layer(list(layers))
        name, features = subject.folder.resolve().name, layers[layer].features.num_features
        table, curves, matrices = (
            subject.folder / file for file in ("approximation.csv", "approximation.png", "attention.png")
        )
        write_findings(findings, table)
        yield table
        draw_findings(findings, curves, title=f"{name}: random features against softmax, mean over heads")
        yield curves
        title = f"{name}, {layer}: attention of {features} features and of softmax"
        draw_weights(weights, matrices, heads=self._chosen_heads(layers[layer]), title=title)
        yield matrices

    def _chosen_layer(self, layers: Sequence[str]) -> str:
        wanted = f"layer{self.layer}" if isinstance(self.layer, int) else self.layer or layers[0]
        if wanted in layers:
            return wanted
        nearest = get_close_matches(wanted, layers, n=1, cutoff=0.0)
        raise ValueError(
            f"task.layer={self.layer}: no such FAVOR layer; did you mean {nearest[0]}? (known: {', '.join(layers)})"
        )

    def _chosen_heads(self, attention: FavorAttention) -> list[int]:
        if self.heads is None:
            return list(range(min(DRAWN, attention.heads)))
        wrong = [head for head in self.heads if not 0 <= head < attention.heads]
        if wrong or not self.heads:
            got = f"got {wrong[0]}" if wrong else "got none"
            raise ValueError(f"task.heads must be within 0..{attention.heads - 1}, the layer's FAVOR heads; {got}")
        return self.heads


def ask(subject: Subject, windows: Tensor) -> None:
    """Run a model on windows as its objective does."""
    subject.objective.ask(subject.model, windows, step=None, separator=subject.data.separator)
