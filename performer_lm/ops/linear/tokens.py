"""A run of tokens: whole, as a caller has it, and as a block of tiles that is worked on at once.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `n` tokens, `x` = g b, `t` tiles of a block,
`c` tokens of one, `d` head width, `e` value width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.ops.linear.state import Scratch


class Tokens(NamedTuple):
    """A run of tokens, or the gradients at it.

    A caller's has the shapes that stand first. In a block batch and key heads are one dimension `(g b)`, so that one
    product maps all of a head's tokens; vectors are in the dtype of the sums, and masked ones zero.
    """

    queries: Tensor  # (b, h, n, d); block (x, t, c r, d)
    keys: Tensor  # (b, g, n, d); (x, t, c, d)
    values: Tensor  # (b, g, n, e); (x, t, c, e + 1), [v, 1]
    log_gain: Tensor | None  # (b, g, n); (x, t, c): added to all log features of a key
    log_decay: Tensor | None  # (b, g, n), 0 where masked; (x, t, c)
    mask: Tensor | None  # (b, n); (x, t, c): False keys are absent
    documents: Tensor | None  # (b, 1 + n); (x, t, 1 + c): the document of the token before stands first

    def by_key_heads(self) -> "Tokens":
        """View all of a caller's as `(g, b, n, ...)`, queries as `(g, b, n, r, d)`: how blocks are cut out of it."""
        g = self.keys.shape[1]
        keys, values = (x.transpose(0, 1) for x in (self.keys, self.values))
        log_gain, log_decay = (None if x is None else x.transpose(0, 1) for x in (self.log_gain, self.log_decay))
        mask, documents = (None if x is None else x.expand(g, -1, -1) for x in (self.mask, self.documents))
        return Tokens(by_key_heads(self.queries, g), keys, values, log_gain, log_decay, mask, documents)


def by_key_heads(x: Tensor, g: int) -> Tensor:
    """View `(b, h, n, ...)` as `(g, b, n, r, ...)`."""
    return rearrange(x, "b (g r) n ... -> g b n r ...", g=g)


def cut(n: int, block: int, tile: int) -> Iterator[slice]:
    """Cut n tokens into blocks; what is left over into one of whole tiles, and a last part of a tile."""
    start = 0
    while start < n:
        size = min(block, n - start)
        size = size - size % tile if size > tile else size
        yield slice(start, start + size)
        start += size


def count_parts(n: int, block: int, tile: int) -> int:
    """Return into how many parts `cut` cuts n tokens; of a symbolic n without asking for its value."""
    rest = n % block
    return n // block + -(-rest // block) + torch.sym_min(1, rest // tile) * -(-(rest % tile) // tile)


def take_block(tokens: Tokens, part: slice, tile: int, scratch: Scratch) -> Tokens:
    """Copy a block out of `Tokens.by_key_heads`."""
    queries, keys, values, *rest = (None if x is None else x[:, :, part] for x in tokens[:6])
    assert queries is not None
    assert keys is not None
    assert values is not None
    g, b, n, r, d = queries.shape
    t = max(1, n // tile)
    with_ones = scratch("values", *values.shape[:-1], values.shape[-1] + 1)
    with_ones[..., :-1].copy_(values)
    with_ones[..., -1].fill_(1.0)
    shape, dtype = (g * b, t, keys.shape[2] // t), with_ones.dtype
    queries = queries.reshape(g * b, t, n // t * r, d).to(dtype)
    keys, with_ones = keys.reshape(*shape, d).to(dtype), with_ones.view(*shape, values.shape[-1] + 1)
    log_gain, log_decay, mask = (None if x is None else x.reshape(shape) for x in rest)
    if mask is not None:
        keys = keys.masked_fill(~mask[..., None], 0.0)
        with_ones.masked_fill_(~mask[..., None], 0.0)
    documents = None
    if tokens.documents is not None:
        around = tokens.documents[:, :, part.start : part.stop + 1].reshape(g * b, n + 1)
        documents = around.unfold(1, n // t + 1, n // t)
    return Tokens(queries, keys, with_ones, log_gain, log_decay, mask, documents)
