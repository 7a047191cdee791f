"""What layers are told of a sequence beside its vectors: places, padding, documents, and another sequence to look at.

Letters: `b` batch, `n` tokens, `j` tokens of the context.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Context(NamedTuple):
    """Another sequence, which cross-attention looks at."""

    vectors: Tensor  # (b, j, dim)
    mask: Tensor | None = None  # (b, j) bool: False keys are absent


class Layout(NamedTuple):
    """How the tokens of a sequence lie."""

    places: Tensor  # (b, n): each token's place in its own document, from 0
    mask: Tensor | None = None  # (b, n) bool: False at padding
    segments: Tensor | None = None  # (b, n): ids of packed documents
    context: Context | None = None


def find_places(x: Tensor, mask: Tensor | None, segments: Tensor | None) -> Tensor:
    """Return each token's place `(b, n)` in its own document, counting real tokens only, from 0.

    Pads that stand before the first token get -1.
    """
    if mask is None:
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    else:
        places = mask.to(torch.int64).cumsum(1) - 1
    if segments is None:
        return places
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    first = places if mask is None else places + ~mask  # a document that opens with pads starts after them
    return places - torch.where(starts, first, 0).cummax(1).values
