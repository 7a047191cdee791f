"""Loss and bits per byte over a text, every byte of it counted once.

Letters: `b` batch, `n` tokens.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from performer_lm.data.windows import IGNORE, FiniteWindows
from performer_lm.evaluation.base import Evaluation, Subject
from performer_lm.language_model import LanguageModel
from performer_lm.objectives import Objective, choose_chunk_size
from performer_lm.ops.precision import sum_dtype
from performer_lm.ops.terms import slices


class BitsPerByte(NamedTuple):
    """Losses of a model on a text."""

    loss: float  # nats per prediction
    bits_per_byte: float  # of the text that was predicted
    tokens: int  # predictions
    bytes: int  # that they stand for
    accuracy: float  # share of the predictions that the model thinks likeliest

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)


@torch.inference_mode()
def measure_bits_per_byte(
    model: LanguageModel,
    windows: FiniteWindows,
    *,
    objective: Objective,
    batch_size: int,
    separator: int | None = None,
) -> BitsPerByte:
    """Measure a model on all predictions that the objective asks of the windows.

    Args:
        model: in evaluation mode.
        windows: of the text, each byte in one.
        objective: source of the predictions; next tokens are every id but the first of each window.
        batch_size: windows at a time.
        separator: the id that begins a document where tokens see their own document only.

    Raises:
        ValueError: where there is nothing to predict.
        FloatingPointError: where the loss is not finite.
    """
    device = model.head.weight.device
    nats = torch.zeros((), dtype=torch.float64)
    right = torch.zeros((), dtype=torch.int64)
    tokens, text = 0, 0.0
    for first in range(0, len(windows), batch_size):
        rows = windows.rows(np.arange(first, first + batch_size, dtype=np.int64)).to(device)
        hidden, targets = objective.ask(model, rows, step=None, separator=separator)
        asked = targets != IGNORE
        wanted = targets[asked]
        for logits, expected in _logits(model, hidden[asked], wanted):
            nats += F.cross_entropy(logits, expected, reduction="sum").cpu().double()
            right += (logits.argmax(-1) == expected).sum().cpu()
        tokens, text = tokens + len(wanted), text + windows.byte_lengths[wanted.cpu().numpy()].sum(dtype=np.float64)
    if not text:
        raise ValueError(f"the text is too short: not one {objective.predicted} in it stands for text")
    if not nats.isfinite():
        raise FloatingPointError(f"the loss is not finite: {float(nats)} nats over {tokens:,} {objective.predicted}s")
    return BitsPerByte(
        float(nats) / tokens, float(nats) / (math.log(2) * text), tokens, round(text), int(right) / tokens
    )


def _logits(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of predictions `(n, dim)`, and their targets, as many at a time as fit in memory."""
    for piece in slices(len(targets), choose_chunk_size(len(targets), vocab_size=model.head.out_features)):
        logits = model.head(hidden[piece])
        yield logits.to(sum_dtype(logits)), targets[piece]


@final
class MeasureBitsPerByte(Evaluation):
    """Print loss, bits per byte and accuracy over a text."""

    def check(self, model: LanguageModel, *, folder: Path) -> None:
        """Take any model: each is measured by its own objective."""

    def __call__(self, subject: Subject) -> float:
        model, objective, data, _ = subject
        found = measure_bits_per_byte(
            model, data.held_out, objective=objective, batch_size=data.batch_size, separator=data.separator
        )
        name = objective.predicted
        print(f"{found.tokens:,} {name}s, {found.bytes:,} bytes of text")
        per_token = f", {found.bits_per_token:.4f} bits per {name}" if name != "token" else ""
        print(f"loss {found.loss:.4f} nats per {name}{per_token}, {found.bits_per_byte:.4f} bits per byte")
        print(f"accuracy {found.accuracy:.4f}")
        return found.bits_per_byte
