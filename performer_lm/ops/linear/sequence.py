"""A sequence of causal linear attention: a loop over blocks, and a backward that computes features anew.

Forward keeps q, k, v, the output and one state per block; backward walks the blocks from the end. So nothing of size
n x m outlives its block, let alone n x m x e.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `n` tokens, `d` head width, `e` value width,
`m` features. Inside a block batch and key heads are one dimension `(g b)`, so that one product maps all of a head's
tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.ops.linear import tokens as blocks
from performer_lm.ops.linear.block import Grads, pull_step, take_step
from performer_lm.ops.linear.fading import Times
from performer_lm.ops.linear.scratch import Scratch
from performer_lm.ops.linear.tokens import Maps, State, Tokens


class Inputs(NamedTuple):
    """A whole sequence."""

    queries: Tensor  # (b, h, n, d)
    keys: Tensor  # (b, g, n, d)
    values: Tensor  # (b, g, n, e)
    log_gain: Tensor | None  # (b, g, n): added to all log features of a key
    log_decay: Tensor | None  # (b, g, n): 0 where masked
    mask: Tensor | None  # (b, n): False keys are absent
    documents: Tensor | None  # (b, 1 + n): the state's document first

    def by_key_heads(self) -> "Inputs":
        """View all of it as `(g, b, n, ...)`, queries as `(g, b, n, r, d)`: how blocks are cut out of it."""
        g = self.keys.shape[1]
        keys, values, log_gain, log_decay = (None if x is None else x.transpose(0, 1) for x in self[1:5])
        mask, documents = (None if x is None else x.expand(g, -1, -1) for x in self[5:])
        assert keys is not None
        assert values is not None
        return Inputs(_by_key_heads(self.queries, g), keys, values, log_gain, log_decay, mask, documents)


class Trace(NamedTuple):
    """What a forward returns, and what it leaves for its backward."""

    out: Tensor  # (b, h, n, e), before it is rounded to the inputs' dtype
    mass: Tensor  # (b, h, n, 1): its denominators, each on its own scale
    sums: Tensor  # (blocks + 1, (g b), m, e + 1): before each block and after the last; the last alone if not kept
    exponents: Tensor  # (blocks + 1, (g b), m), likewise
    dense: Tensor  # (blocks,) bool, on the host: which were put on one scale, as denominators are on the form's

    @property
    def after(self) -> State:
        """Return the state after the last token."""
        return State(self.sums[-1], self.exponents[-1])


def cut(n: int, chunk_size: int) -> Iterator[slice]:
    """Cut n tokens into blocks of `chunk_size`; what is left over into whole tiles and a last part of one."""
    start = 0
    while start < n:
        size = min(chunk_size, n - start)
        size = size - size % blocks.TILE if size > blocks.TILE else size
        yield slice(start, start + size)
        start += size


def attend(maps: Maps, chunk_size: int, inputs: Inputs, state: State, *, keep: bool) -> Trace:
    """Attend to a sequence, keeping all the states on the way, or the last only."""
    (b, h, n, _), (g, e) = inputs.queries.shape, inputs.values.shape[1::2]
    parts = list(cut(n, chunk_size))
    scratch = Scratch(state.sums.dtype, state.sums.device)
    out, mass = state.sums.new_empty(b, h, n, e), state.sums.new_empty(b, h, n, 1)
    sums = state.sums.new_empty(len(parts) + 1 if keep else 1, *state.sums.shape)
    sums[0], exponents, dense = state.sums, [state.exponent], []
    inputs, placed = inputs.by_key_heads(), [_by_key_heads(x, g) for x in (out, mass)]
    for index, part in enumerate(parts):
        before = State(sums[index if keep else 0], exponents[-1])
        after = sums[index + 1 if keep else 0]
        seen = take_step(maps, _take(inputs, part, scratch), before, scratch, after=after)
        exponents = [*exponents, seen.exponent] if keep else [seen.exponent]
        dense.append(seen.dense)
        weighted = seen.weighted.unflatten(0, (g, b))
        found = weighted[..., e:]
        found.masked_fill_(found == 0, 1.0)
        own_out, own_mass = (x[:, :, part].unflatten(2, weighted.shape[2:4]) for x in placed)
        torch.div(weighted[..., :e], found, out=own_out)
        own_mass.copy_(found)
    return Trace(out, mass, sums, torch.stack(exponents), torch.tensor(dense, dtype=torch.bool, device="cpu"))


def pull(
    maps: Maps, chunk_size: int, inputs: Inputs, trace: Trace, grad: Tensor, grad_sums: Tensor, *, wanted: bool
) -> tuple[Inputs, Tensor, list[Tensor | None]]:
    """Walk the blocks from the end.

    Args:
        maps: as in the forward.
        chunk_size: likewise.
        inputs: likewise.
        trace: of a forward that kept its states.
        grad: at the output.
        grad_sums: at the sums after the last token.
        wanted: whether the maps' tensors want gradients.

    Returns:
        The gradients at inputs, the state's sums and the maps' tensors.
    """
    found, g = _room_for_gradients(inputs), inputs.keys.shape[1]
    totals: list[Tensor | None] = [None] * len(maps.tensors)
    scratch = Scratch(trace.out.dtype, trace.out.device)
    parts, dense = list(cut(trace.out.shape[2], chunk_size)), trace.dense.tolist()
    inputs, placed, grad_sums = inputs.by_key_heads(), found.by_key_heads(), grad_sums.clone()
    outer = tuple(_by_key_heads(x, g) for x in (grad, trace.out, trace.mass))
    for index in reversed(range(len(parts))):
        part = parts[index]
        tokens = _take(inputs, part, scratch)
        before, after = State(trace.sums[index], trace.exponents[index]), trace.exponents[index + 1]
        own_grad, own_out, own_mass = (x[:, :, part] for x in outer)
        grads = Grads(_pull_division(own_grad, own_out, own_mass, scratch), grad_sums)
        pulled = pull_step(maps, tokens, before, after, grads, scratch, dense=dense[index], wanted=wanted)
        grad_sums = pulled.sums
        for x, piece in zip(placed[:5], pulled[:5], strict=True):
            if x is not None and piece is not None:
                place = x[:, :, part]
                place.copy_(piece.view(place.shape))
        totals = [_plus(total, more) for total, more in zip(totals, pulled.tensors, strict=True)]
    return found, grad_sums, totals


def _room_for_gradients(inputs: Inputs) -> Inputs:
    log_gain, log_decay = (None if x is None else torch.empty_like(x) for x in (inputs.log_gain, inputs.log_decay))
    queries, keys, values = (torch.empty_like(x) for x in inputs[:3])
    return Inputs(queries, keys, values, log_gain, log_decay, None, None)


def _by_key_heads(x: Tensor, g: int) -> Tensor:
    """View `(b, h, n, ...)` as `(g, b, n, r, ...)`."""
    return rearrange(x, "b (g r) n d -> g b n r d", g=g)


def _take(inputs: Inputs, part: slice, scratch: Scratch) -> Tokens:
    """Cut out one block, in the dtype of the sums, with nothing left in masked tokens."""
    queries, keys, values, log_gain, log_decay, mask = (None if x is None else x[:, :, part] for x in inputs[:6])
    assert queries is not None
    assert keys is not None
    assert values is not None
    g, b, n, r, d = queries.shape
    with_ones = scratch("values", g, b, n, values.shape[-1] + 1)
    with_ones[..., :-1].copy_(values)
    with_ones[..., -1] = 1.0
    with_ones, dtype = with_ones.view(g * b, n, -1), with_ones.dtype
    queries, keys = queries.reshape(g * b, n * r, d).to(dtype), keys.reshape(g * b, n, d).to(dtype)
    log_gain, log_decay, mask = (None if x is None else x.reshape(g * b, n) for x in (log_gain, log_decay, mask))
    if mask is not None:
        keys = keys.masked_fill(~mask[..., None], 0.0)
        with_ones.masked_fill_(~mask[..., None], 0.0)
    documents = None
    if inputs.documents is not None:
        documents = inputs.documents[:, :, part.start : part.stop + 1].reshape(g * b, n + 1)
    times = Times(None if log_decay is None else log_decay.to(dtype), documents)
    return Tokens(queries, keys, with_ones, log_gain, mask, times, g)


def _pull_division(grad: Tensor, out: Tensor, mass: Tensor, scratch: Scratch) -> Tensor:
    """Return the gradient at numerators and denominators, `((g b), n, r, e + 1)`, given that at their quotient `out`.

    All are `(g, b, n, r, ...)`.
    """
    found = scratch("grad seen", *out.shape[:-1], out.shape[-1] + 1)
    numerator = torch.div(grad, mass, out=found[..., :-1])
    torch.sum(numerator * out, dim=-1, out=found[..., -1]).neg_()
    return found.flatten(0, 1)


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None or more is None else total.add_(more)
