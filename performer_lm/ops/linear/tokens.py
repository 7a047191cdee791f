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
    """Copy a block out of a caller's tokens."""
    queries = by_key_heads(tokens.queries[:, :, part], tokens.keys.shape[1])
    keys, values = tokens.keys[:, :, part].transpose(0, 1), tokens.values[:, :, part].transpose(0, 1)
    g, b, n, r, d = queries.shape
    t = max(1, n // tile)
    with_ones = scratch("values", *values.shape[:-1], values.shape[-1] + 1)
    with_ones[..., :-1].copy_(values)
    with_ones[..., -1].fill_(1.0)
    shape, dtype = (g * b, t, keys.shape[2] // t), with_ones.dtype
    queries = queries.reshape(g * b, t, n // t * r, d).to(dtype)
    keys, with_ones = keys.reshape(*shape, d).to(dtype), with_ones.view(*shape, values.shape[-1] + 1)
    log_gain = None if tokens.log_gain is None else tokens.log_gain[:, :, part].transpose(0, 1).reshape(shape)
    log_decay = None if tokens.log_decay is None else tokens.log_decay[:, :, part].transpose(0, 1).reshape(shape)
    mask = None if tokens.mask is None else tokens.mask[:, part].expand(g, -1, -1).reshape(shape)
    if mask is not None:
        keys = keys.masked_fill(~mask[..., None], 0.0)
        with_ones.masked_fill_(~mask[..., None], 0.0)
    documents = None
    if tokens.documents is not None:
        around = tokens.documents[:, part.start : part.stop + 1].expand(g, -1, -1).reshape(g * b, n + 1)
        documents = around.unfold(1, n // t + 1, n // t)
    return Tokens(queries, keys, with_ones, log_gain, log_decay, mask, documents)
