"""A sequence of causal linear attention: a loop over blocks, and a backward that computes features anew.

Forward keeps q, k, v, the output, each query's denominator, and one state per block; backward walks
the blocks from the end. Nothing of size n x m outlives its block, let alone n x m x e. On an accelerator a block is the
whole sequence where memory allows, on a CPU as much as caches hold.

Letters: `b` batch, `h` heads, `g` key heads, `r` = h / g queries per key, `n` tokens, `x` = g b, `t` chunks of a block,
`c` tokens of one, `d` head width, `e` value width, `m` features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.ops.linear.chunks import Chunks, open_chunks
from performer_lm.ops.linear.exact import EXACT_TILE, open_exact
from performer_lm.ops.linear.fading import sum_up_to
from performer_lm.ops.linear.state import EMPTY, Geometry, LinearState, Scratch
from performer_lm.ops.linear.sums import attend_tiles, pull_tiles
from performer_lm.ops.linear.tokens import Tokens, by_key_heads, cut, take_block
from performer_lm.ops.maps import BlockMap, Maps
from performer_lm.ops.precision import LOG2_E


class Trace(NamedTuple):
    """The results of a forward, and its records for the backward."""

    out: Tensor  # (b, h, n, e), before it is rounded to the inputs' dtype
    mass: Tensor  # (b, h, n), float64: the denominators, or log2 of them where features are logarithms
    sums: Tensor  # (blocks, x, m, e + 1): before each block; of no blocks where they are not kept
    exponents: Tensor  # (blocks + 1, x, m), float64: before each block, and after the last
    after: Tensor  # (x, m, e + 1): the sums after the last token


def attend(maps: Maps, geometry: Geometry, tokens: Tokens, state: LinearState, *, keep: bool) -> Trace:
    """Attend to a sequence from a state `(x, m, e + 1)`, keeping all the states on the way or none."""
    (b, h, n, _), (g, e) = tokens.queries.shape, tokens.values.shape[1::2]
    parts = list(cut(n, geometry.block, geometry.tile))
    walk = Walk(maps, tokens, geometry, Scratch(state.sums.dtype, state.sums.device))
    out, mass = state.sums.new_empty(b, h, n, e), state.exponent.new_empty(b, h, n)
    sums = state.sums.new_empty(len(parts) if keep else 0, *state.sums.shape)
    state, exponents = LinearState(state.sums.clone(), state.exponent), [state.exponent]
    for index, part in enumerate(parts):
        if keep:
            sums[index] = state.sums
        state = walk.forward(part, state, (by_key_heads(out, g), by_key_heads(mass, g)))
        exponents.append(state.exponent)
    exponents[-1] = exponents[-1].masked_fill(state.sums[..., -1] == 0, EMPTY)  # nothing has no size
    return Trace(out, mass, sums, torch.stack(exponents), state.sums)


def pull(
    maps: Maps, geometry: Geometry, tokens: Tokens, trace: Trace, grads: Sequence[Tensor | None], *, wanted: bool
) -> tuple[Tokens, Tensor, list[Tensor | None]]:
    """Walk the blocks from the end.

    Args:
        maps: as in the forward, like geometry and tokens.
        geometry: of blocks.
        tokens: of the caller.
        trace: of a forward that kept its states.
        grads: at the output, the masses and the sums after the last token, where they have any.
        wanted: whether the maps' tensors want gradients.

    Returns:
        The gradients at tokens, the state's sums and the maps' tensors.
    """
    g = tokens.keys.shape[1]
    walk = Walk(maps, tokens, geometry, Scratch(trace.out.dtype, trace.out.device))
    q, k, v = (torch.empty_like(x) for x in tokens[:3])
    log_gain, log_decay = (None if x is None else torch.empty_like(x) for x in tokens[3:5])
    found = Tokens(q, k, v, log_gain, log_decay, None, None)
    places = [by_key_heads(q, g), *(None if x is None else x.transpose(0, 1) for x in found[1:5])]
    outer = [None if x is None else by_key_heads(x, g) for x in (trace.out, trace.mass, *grads[:2])]
    grad_sums, totals = (
        None if grads[2] is None else grads[2].clone(),
        [torch.zeros_like(x) if wanted else None for x in maps.tensors],
    )
    for index, part in reversed(list(enumerate(cut(trace.out.shape[2], geometry.block, geometry.tile)))):
        before = LinearState(trace.sums[index], trace.exponents[index])
        gathered = Gradients(places, totals)
        grad_sums = walk.backward(part, before, trace.exponents[index + 1], outer, grad_sums, gathered)
    assert grad_sums is not None or not trace.out.shape[2]
    return found, torch.zeros_like(trace.after) if grad_sums is None else grad_sums, totals


class Gradients(NamedTuple):
    """Where the gradients of a sequence are gathered."""

    tokens: list[Tensor | None]  # (g, b, n, ...) or, at queries, (g, b, n, r, d)
    tensors: list[Tensor | None]  # of the maps


@dataclass(frozen=True)
class Walk:
    """One block after the other, each in the form that its features allow."""

    maps: Maps
    tokens: Tokens  # of the caller
    geometry: Geometry
    scratch: Scratch

    def forward(self, part: slice, state: LinearState, results: tuple[Tensor, Tensor] | None) -> LinearState:
        """Take the tokens of `part` in, and overwrite the sums of `state`.

        Args:
            part: of the sequence.
            state: before it.
            results: for outputs `(g, b, n, r, e)` and masses `(g, b, n, r)` of the sequence; None to leave them out.
        """
        opened = self.open(part, state)
        if isinstance(opened, list):
            for smaller in opened:
                state = self.forward(smaller, state, results)
            return state
        block, chunks = opened
        in_place = self.geometry.one_scale and chunks.pull_own is None
        seen = attend_tiles(chunks, block.values, state.sums, self.scratch, in_place=in_place, after=state.sums)
        if results is not None:
            out, kept = (x[:, :, part] for x in results)
            mass = seen[..., -1:]
            found = mass if chunks.peak is None else mass.to(kept.dtype).log2() + chunks.peak
            kept.copy_(found.reshape(kept.shape))
            if self._may_see_nothing(block):
                mass.masked_fill_(mass == 0, 1.0)
            g, b, n, r, _ = out.shape
            seen = seen.unflatten(0, (g, b)).unflatten(3, (n // seen.shape[1], r))
            torch.div(seen[..., :-1], seen[..., -1:], out=out.unflatten(2, seen.shape[2:4]))
        return state if chunks.steps.last is None else LinearState(state.sums, chunks.steps.last)

    def backward(
        self,
        part: slice,
        before: LinearState,
        exponent: Tensor,
        outer: list[Tensor | None],
        grad_sums: Tensor | None,
        gathered: Gradients,
    ) -> Tensor:
        """Pull gradients back through the tokens of `part`, and return that at the sums before them.

        Args:
            part: of the sequence.
            before: the state before it.
            exponent: `(x, m)`, of the state after it.
            outer: outputs `(g, b, n, r, e)`, masses `(g, b, n, r)`, and the gradients at them, of the sequence.
            grad_sums: `(x, m, e + 1)`, at the sums after it.
            gathered: where the gradients go.
        """
        opened = self.open(part, before)
        if isinstance(opened, list):
            state, states = LinearState(before.sums.clone(), before.exponent), []
            for smaller in opened:
                states.append(LinearState(state.sums.clone(), state.exponent))
                state = self.forward(smaller, state, None)
            exponents = [*(state.exponent for state in states[1:]), exponent]
            for smaller, start, stop in reversed(list(zip(opened, states, exponents, strict=True))):
                grad_sums = self.backward(smaller, start, stop, outer, grad_sums, gathered)
            assert grad_sums is not None
            return grad_sums
        block, chunks = opened
        if grad_sums is None:
            grad_sums = torch.zeros_like(before.sums)
        elif chunks.steps.last is not None:
            higher = (chunks.steps.last - exponent).masked_fill_(exponent == EMPTY, 0.0)
            grad_sums.mul_(higher.exp2_().to(grad_sums.dtype)[..., None])
        grad = self._pull_division(part, block, chunks, outer)
        features = chunks.keys
        in_place = self.geometry.one_scale and chunks.pull_own is None
        queries, keys, values, grad_before = pull_tiles(
            chunks, block.values, grad, before.sums, grad_sums, self.scratch, in_place=in_place
        )
        if block.mask is not None and not self.maps.key.logarithmic:
            keys.masked_fill_(~block.mask[..., None], 0.0)
        log_gain = log_decay = None
        if block.log_gain is not None or block.log_decay is not None:
            log_gain = (keys if self.maps.key.logarithmic else keys * features).sum(dim=-1)
        if block.log_decay is not None and log_gain is not None:
            log_decay = _pull_decay(log_gain, (grad_before * before.sums).sum(dim=(1, 2)), self.scratch)
        count = len(self.maps.query.tensors)
        found = (
            self._pull_map(self.maps.query, block.queries, queries, gathered.tensors, 0),
            self._pull_map(self.maps.key, block.keys, keys, gathered.tensors, count),
            *(values, log_gain, log_decay),
        )
        for whole, piece in zip(gathered.tokens, found, strict=True):
            if whole is not None and piece is not None:
                place = whole[:, :, part]
                place.copy_(piece.reshape(place.shape))
        return grad_before

    def open(self, part: slice, state: LinearState) -> tuple[Tokens, Chunks] | list[slice]:
        """Return a block and its matrices, or the parts it has to be taken in, as its features lie too far apart."""
        tile, _, one_scale, _ = self.geometry
        block = take_block(self.tokens, part, tile, self.scratch)
        chunks = open_chunks(self.maps, block, state, self.scratch, one_scale=one_scale)
        if chunks is not None:
            return block, chunks
        n, size = part.stop - part.start, EXACT_TILE
        if one_scale and n > EXACT_TILE:  # looks cost nothing on a CPU: find the few tokens that are loud
            size = tile if n > tile else EXACT_TILE
            return [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]
        if n > EXACT_TILE and n % EXACT_TILE:
            return [slice(part.start, part.stop - n % size), slice(part.stop - n % size, part.stop)]
        block = take_block(self.tokens, part, EXACT_TILE, self.scratch)
        return block, open_exact(self.maps, block, state, self.scratch)

    def _may_see_nothing(self, block: Tokens) -> bool:
        """Return True if a query's denominator may be 0: all keys may be masked, or features may vanish."""
        return block.mask is not None or not self.maps.key.logarithmic or not block.keys.shape[2]

    def _pull_division(self, part: slice, block: Tokens, chunks: Chunks, outer: list[Tensor | None]) -> Tensor:
        """Return the gradient at numerators and denominators `(x, t, c r, e + 1)`."""
        out, kept, grad, grad_mass = (None if x is None else x[:, :, part] for x in outer)
        assert out is not None
        assert kept is not None
        if grad is None:
            grad = torch.zeros_like(out)
        shape = (*chunks.queries.shape[:3], 1)
        mass = kept.reshape(shape)
        if chunks.peak is not None:
            mass = (mass - chunks.peak).exp2_()
        if self._may_see_nothing(block):
            mass = mass.masked_fill(mass == 0, 1.0)
        mass = mass.to(out.dtype).view(*out.shape[:-1], 1)
        found = self.scratch("grad seen", *out.shape[:-1], out.shape[-1] + 1)
        numerator = torch.div(grad, mass, out=found[..., :-1])
        torch.sum(numerator * out, dim=-1, out=found[..., -1]).neg_()
        if grad_mass is not None:
            more = grad_mass[..., None].to(mass.dtype)
            found[..., -1:].add_(more if chunks.peak is None else LOG2_E * more / mass)
        return found.view(*shape[:3], found.shape[-1])

    def _pull_map(self, a_map: BlockMap, x: Tensor, grad: Tensor, totals: list[Tensor | None], first: int) -> Tensor:
        """Pull the gradient at features of x back to x, and add that at the map's tensors to the totals."""
        wanted = any(total is not None for total in totals)
        found, tensors = a_map.pull(self.maps.flat(x), self.maps.flat(grad), wanted=wanted)
        for total, more in zip(totals[first:], tensors, strict=False):
            if total is not None and more is not None:
                total.add_(more)
        return found.view(x.shape)


def _pull_decay(totals: Tensor, before: Tensor, scratch: Scratch) -> Tensor:
    """Return the gradient at log_decay `(x, t, c)`.

    To fade at token j is to weaken all keys before it: for a query before j, all that it sees, which cancels.

    Args:
        totals: `(x, t, c)`, the gradients at the logarithms of the keys' weights.
        before: `(x,)`, that at the logarithm of the state's.
        scratch: holds triangles.
    """
    upto = sum_up_to(totals, scratch)
    tiles = upto[..., -1]
    earlier = upto - totals + (sum_up_to(tiles, scratch) - tiles + before[:, None])[..., None]
    return earlier.to(totals.dtype)
