"""Dropout as a counter hash: whether a probability is kept is a pure function of (seed, b, h, i, j).

Any block of the mask can be computed on its own, so exact, chunked and tiled attention drop the same probabilities
under the same seed, forward and backward, whatever their blocks; and the global generator is never touched.

Letters: `b` batch, `h` heads, `i` queries, `j` keys.
"""

import torch
from torch import Tensor

from performer_lm.ops.hashing import mix, mix32_


def keep_mask(
    seed: int, rate: float, batch: int, heads: int, rows: range, cols: range, *, device: torch.device
) -> Tensor:
    """Return True where a probability is kept: `(batch, heads, rows, cols)`, each with chance `1 - rate`.

    `rows` and `cols` are the places of the block in the whole i x j matrix.
    """
    stream = torch.arange(batch * heads, device=device).reshape(batch, heads, 1, 1)
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    col = torch.arange(cols.start, cols.stop, device=device)
    # Each counter is hashed under a key of its own, so that no two of them can stand in for each other.
    per_seed = mix(mix(seed ^ 0x6A09E667) ^ (seed >> 32))
    per_row = mix(mix(stream ^ 0xBB67AE85) ^ per_seed) ^ mix(row ^ 0x3C6EF372)
    per_col = mix(col ^ 0xA54FF53A)
    # int32 halves the traffic of the only part that has i * j elements.
    bits = mix32_(mix(per_row).int() ^ per_col.int())
    return bits.bitwise_and_(0x7FFFFFFF) >= round(rate * 2**31)


def check_dropout(rate: float, seed: int | None) -> None:
    """Raise ValueError unless `rate` is in [0, 1) and a positive rate comes with a seed."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {rate}")
    if rate > 0.0 and seed is None:
        raise ValueError(f"dropout ({rate}) needs a seed: it is a function of (seed, b, h, i, j)")
