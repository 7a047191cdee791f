"""Packed documents, to be cut into blocks and read from either end.

Letters: `b` batch, `g` key heads, `r` queries per key, `n` tokens, `d` head width, `e` value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Documents in a row, in the dtype of the sums."""

    queries: Tensor  # (g, b, n, r, d)
    keys: Tensor  # (g, b, n, d)
    values: Tensor  # (g, b, n, e + 1): [v, 1]
    log_gain: Tensor | None  # (g, b, n)
    hidden: Tensor | None  # (b, n): True keys are absent
    documents: Tensor  # (b, 1 + n): the first token's document stands twice

    def part(self, start: int, stop: int) -> "Packed":
        """Cut out some tokens."""
        return Packed(
            queries=self.queries[:, :, start:stop],
            keys=self.keys[:, :, start:stop],
            values=self.values[:, :, start:stop],
            log_gain=None if self.log_gain is None else self.log_gain[:, :, start:stop],
            hidden=None if self.hidden is None else self.hidden[:, start:stop],
            documents=self.documents[:, start : stop + 1],
        )

    def reversed(self) -> "Packed":
        """Turn the row of tokens round."""
        documents = self.documents[:, 1:].flip(1)
        return Packed(
            queries=self.queries.flip(2),
            keys=self.keys.flip(2),
            values=self.values.flip(2),
            log_gain=None if self.log_gain is None else self.log_gain.flip(2),
            hidden=None if self.hidden is None else self.hidden.flip(1),
            documents=torch.cat([documents[:, :1], documents], dim=1),
        )
