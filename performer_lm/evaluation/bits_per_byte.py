"""Loss and bits per byte over held-out text, every byte of it counted once."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from performer_lm.data.windows import IGNORE, FiniteWindows, segments_of, shift
from performer_lm.model import PerformerLM


class BitsPerByte(NamedTuple):
    """What a model makes of a text."""

    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    bytes: int
    accuracy: float  # share of the tokens that the model thinks likeliest


@torch.inference_mode()
def measure_bits_per_byte(
    model: PerformerLM,
    windows: FiniteWindows,
    *,
    batch_size: int,
    separator: int | None = None,
) -> BitsPerByte:
    """Predict every id of the windows but the first of each.

    Args:
        model: in evaluation mode.
        windows: of the text, each byte in one.
        batch_size: windows at a time.
        separator: the id that begins a document where tokens see their own document only.
    """
    device = model.head.weight.device
    nats = torch.zeros((), dtype=torch.float64)
    right = torch.zeros((), dtype=torch.int64)
    tokens, text = 0, 0.0
    for first in range(0, len(windows), batch_size):
        rows = windows.rows(np.arange(first, first + batch_size, dtype=np.int64))
        inputs, targets = shift(rows.to(device))
        segments = None if separator is None else segments_of(inputs, separator)
        logits = model(inputs, segments=segments).flatten(0, 1).float()
        nats += F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum").double().cpu()
        right += (logits.argmax(-1) == targets.flatten()).sum().cpu()
        counted = targets[targets != IGNORE].cpu().numpy()
        tokens, text = tokens + len(counted), text + windows.byte_lengths[counted].sum(dtype=np.float64)
    return BitsPerByte(
        float(nats) / tokens, float(nats) / (math.log(2) * text), tokens, round(text), int(right) / tokens
    )
