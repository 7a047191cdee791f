"""Loss and bits per byte over held-out text, every byte of it counted once.

Letters: `b` batch, `n` context.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from performer_lm.data.windows import IGNORE, Ids, num_validation_windows, shift, validation_batch
from performer_lm.model import PerformerLM


class BitsPerByte(NamedTuple):
    """What a model makes of a text."""

    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.inference_mode()
def measure_bits_per_byte(
    model: PerformerLM, ids: Ids, byte_lengths: NDArray[np.int64], *, context: int, batch_size: int
) -> BitsPerByte:
    """Predict every id but the first, in windows of `context`.

    Args:
        model: in evaluation mode.
        ids: flat ids `(n,)`.
        byte_lengths: bytes of text that each id stands for, `(vocab,)`.
        context: tokens that the model sees at once.
        batch_size: windows at a time.
    """
    device = model.head.weight.device
    nats = torch.zeros((), dtype=torch.float64)
    windows = num_validation_windows(len(ids), context=context)
    for index in range(-(-windows // batch_size)):
        batch = validation_batch(ids, index=index, batch_size=batch_size, context=context).to(device)
        inputs, targets = shift(batch)
        logits = model(inputs).flatten(0, 1).float()
        nats += F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum").double().cpu()
    text = int(byte_lengths[np.asarray(ids[1:], dtype=np.int64)].sum())
    tokens = len(ids) - 1
    return BitsPerByte(float(nats) / tokens, float(nats) / (math.log(2) * text), tokens, text)
