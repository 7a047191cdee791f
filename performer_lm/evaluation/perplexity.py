"""`evaluate.py task=perplexity`: loss, perplexity and bits per byte over a text, every byte of it counted once.

scoring.py says how each prediction of a text is scored. Letters: `t` predictions, `k` buckets.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np

from performer_lm.data.windows import ByteLengths
from performer_lm.evaluation.base import Evaluation, Subject, check_next_token, print_table
from performer_lm.evaluation.buckets import POSITIONS, Buckets
from performer_lm.evaluation.scoring import Scores, score_documents, score_strided, score_windows
from performer_lm.language_model import LanguageModel
from performer_lm.ranges import Count, ranged

FARTHEST: Final = 2**40  # position that a bucket is made for


class Line(NamedTuple):
    """Losses of the predictions at some positions."""

    positions: str
    share: float  # of all predictions
    loss: float  # nats per prediction
    bits_per_byte: float


class Perplexity(NamedTuple):
    """Losses of a model on a text."""

    loss: float  # nats per prediction
    bits_per_byte: float  # of the text that was predicted
    tokens: int  # predictions
    bytes: int  # that they stand for
    accuracy: float  # share of the predictions that the model thinks likeliest
    lines: list[Line]  # by position

    @property
    def bits_per_token(self) -> float:
        """Return bits per prediction."""
        return self.loss / math.log(2)


def perplexity_of(loss: float) -> float:
    """Return among how many equally likely ids a model of this loss is as unsure; infinite past float64."""
    return math.exp(loss) if loss < 709 else math.inf


def measure_perplexity(
    scores: Iterable[Scores], *, byte_lengths: ByteLengths, name: str = "token", context: int = FARTHEST
) -> Perplexity:
    """Sum up scored predictions.

    Args:
        scores: of the predictions, as scoring.py yields them.
        byte_lengths: `(vocab,)` bytes of text that each id stands for.
        name: of a prediction, for messages.
        context: above every position.

    Raises:
        ValueError: where there is nothing to predict.
        FloatingPointError: where the loss is not finite.
    """
    buckets = Buckets(POSITIONS, limit=context)
    counts, nats, text = np.zeros((3, len(buckets)))
    right = 0
    for each in scores:
        counts += buckets.add_up(each.positions)
        nats += buckets.add_up(each.positions, each.nats)
        text += buckets.add_up(each.positions, byte_lengths[each.targets])
        right += int(each.right.sum())
    tokens = int(counts.sum())
    if not text.any():
        raise ValueError(f"the text is too short: not one {name} in it stands for text")
    if not np.isfinite(nats).all():
        raise FloatingPointError(f"the loss is not finite: {nats.sum()} nats over {tokens:,} {name}s")
    bits = nats / math.log(2)
    lines = [
        Line(label, count / tokens, nat / count, bit / size if size else math.nan)
        for label, count, nat, bit, size in zip(buckets.labels, counts, nats, bits, text, strict=True)
        if count
    ]
    total = float(nats.sum())
    return Perplexity(total / tokens, float(bits.sum() / text.sum()), tokens, round(text.sum()), right / tokens, lines)


@ranged
@final
class MeasurePerplexity(Evaluation):
    """Print loss, perplexity, bits per byte and accuracy over a text, and how they change with the position.

    Without options each window is read for itself, as in training.

    Args:
        stride: tokens from one window to the next, of which only the last `stride` are predicted, so that each sees
            almost a whole window before it; None: windows do not overlap.
        carry: whether to read each document from its start to its end, however long, with a decoding state that is
            carried on from block to block, as generation reads it.

    Raises:
        ValueError: for both at once.
    """

    def __init__(self, *, stride: Count | None, carry: bool) -> None:
        if stride is not None and carry:
            raise ValueError("stride moves windows that overlap and carry reads documents whole: give one of them")
        self.stride, self.carry = stride, carry

    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Take any model, each by its own objective; with options, one that predicts each next token."""
        if self.stride is not None or self.carry:
            check_next_token(model, f"task=perplexity with task.{'carry' if self.carry else 'stride'}")

    def __call__(self, subject: Subject) -> float:
        """Return bits per byte."""
        data, name = subject.data, subject.objective.predicted
        lengths = data.held_out.byte_lengths
        limit = FARTHEST if self.carry else data.context
        found = measure_perplexity(self._score(subject), byte_lengths=lengths, name=name, context=limit)
        print(f"{found.tokens:,} {name}s, {found.bytes:,} bytes of text")
        per_token = f", {found.bits_per_token:.4f} bits per {name}" if name != "token" else ""
        print(f"loss {found.loss:.4f} nats per {name}{per_token}, {found.bits_per_byte:.4f} bits per byte")
        print(f"accuracy {found.accuracy:.4f}, perplexity {perplexity_of(found.loss):.4f}")
        columns = ["position", "share", "loss", "perplexity", "bits per byte"]
        rows = (
            [at, f"{share:.3f}", f"{loss:.4f}", f"{perplexity_of(loss):.2f}", f"{bits:.4f}"]
            for at, share, loss, bits in found.lines
        )
        print_table(f"by position in the {'document' if self.carry else 'window'}", columns, rows)
        return found.bits_per_byte

    def _score(self, subject: Subject) -> Iterable[Scores]:
        data, batch = subject.data, subject.data.batch_size
        if self.carry:
            model = check_next_token(subject.model, "task=perplexity")
            return score_documents(model, data.held_out, batch_size=batch, end_id=data.tokenizer.end_id)
        options: Any = {"objective": subject.objective, "batch_size": batch, "separator": data.separator}
        if self.stride is not None:
            return score_strided(subject.model, data.held_out, stride=self.stride, **options)
        return score_windows(subject.model, data.held_out, **options)
