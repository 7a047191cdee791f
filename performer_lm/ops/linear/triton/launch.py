"""Attend to a sequence and pull gradients back by the kernels, in place of `sequence.attend` and `sequence.pull`.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `x` = g b, `T` chunks, `d` head width, `e` value width, `m`
features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from performer_lm.ops.linear.sequence import Trace
from performer_lm.ops.linear.state import EMPTY, LinearState
from performer_lm.ops.linear.tokens import Tokens
from performer_lm.ops.linear.triton import gradients, outputs, states
from performer_lm.ops.maps import Exponential, Maps
from performer_lm.ops.precision import LOG2_E

CHUNK = 64
"""Tokens that see each other through a matrix of weights."""
EXACT_ROWS = 16
"""Queries or keys of a program where weights are summed pair by pair."""


class Options(NamedTuple):
    """How a kernel is cut and compiled."""

    rows: int
    """Queries or keys of a program."""
    features: int
    """Features of a step, or of a program."""
    warps: int
    stages: int


OPTIONS = {
    "states": Options(CHUNK, 32, 2, 2),
    "outputs": Options(CHUNK, 64, 4, 2),
    "pull_states": Options(CHUNK, 32, 2, 3),
    "pull_queries": Options(CHUNK, 32, 2, 2),
    "pull_keys": Options(CHUNK, 32, 4, 2),
}
"""The fastest of sixteen tried on an H200 (docs/log.md) among those that were right: with projections in float32, ptxas
got Hopper's own matrix instructions wrong in both `pull_` kernels, which is why `auto` looks before it trusts."""


def choose_options(kernel: str, num_features: int, *, wide: bool) -> dict[str, int]:
    """Return how a kernel is compiled; `wide` for heads of more than 64 channels."""
    _, features, warps, stages = OPTIONS[kernel]
    tile = min(32 if wide else features, max(16, triton.next_power_of_2(num_features)))
    return {"BM": tile, "num_warps": 8 if wide else warps, "num_stages": stages}


class Launch:
    """One sequence's sizes, inputs and per-token numbers, as every kernel takes them.

    Args:
        maps: of queries and keys, both `Exponential` over the same tensors.
        tokens: of the caller.
        state: before them, `(x, m, e + 1)` and `(x, m)`.
    """

    def __init__(self, maps: Maps, tokens: Tokens, state: LinearState) -> None:
        assert isinstance(maps.key, Exponential)
        self.tokens, self.state = tokens, state
        self.q, self.k, self.v = (_rowwise(x) for x in tokens[:3])
        (self.b, self.h, self.n, self.d), (self.g, self.e) = self.q.shape, self.v.shape[1::2]
        self.m, self.chunks = state.sums.shape[1], triton.cdiv(self.n, CHUNK)
        weight, *bias = (x.contiguous() for x in maps.key.tensors)
        self.scale, self.norm = maps.key.scale, maps.key.norm
        width, value_width = (max(16, triton.next_power_of_2(size)) for size in (self.d, self.e))
        self.options = {name: choose_options(name, self.m, wide=max(width, value_width) > 64) for name in OPTIONS}
        self.low = all(x.dtype == torch.bfloat16 for x in (self.q, self.k, self.v))
        self.weight, self.bias, self.rest = weight, bias[0] if bias else weight, weight
        if self.low:
            self.weight = weight.to(torch.bfloat16)
            self.rest = (weight - self.weight).to(torch.bfloat16)
        self.documents = weight if tokens.documents is None else tokens.documents.int().contiguous()
        self.numbers = {"n": self.n, "T": self.chunks, "B": self.b, "G": self.g}
        self.sizes: dict[str, Any] = {
            "factor": LOG2_E * self.scale,
            **{"M": self.m, "D": self.d, "E": self.e, "C": CHUNK, "BD": width, "BE": value_width},
            **{"HAS_BIAS": bool(bias), "HAS_DECAY": tokens.log_decay is not None},
            **{"HAS_DOCUMENTS": tokens.documents is not None, "LOW": self.low},
        }
        self._prepare(width)
        self._absorb()

    def _prepare(self, width: int) -> None:
        b, g, n = self.b, self.g, self.n
        log_gain, log_decay, mask = (None if x is None else x.contiguous() for x in self.tokens[3:6])
        self.gain = self.state.sums.new_empty(b, g, n)
        self.origin = self.state.exponent.new_empty(b, g, self.chunks)
        self.faded = self.gain if log_decay is None else torch.empty_like(self.gain, dtype=torch.float64)
        given = (log_gain, log_decay, None if mask is None else mask.to(torch.int8))
        states.prepare[(self.chunks, b * g)](
            self.k,
            *(self.gain if x is None else x for x in given),
            self.gain,
            self.origin,
            self.faded,
            *self.k.stride()[:3],
            *(n, self.chunks, g),
            **{"norm": self.norm, "D": self.d, "C": CHUNK, "BD": width, "num_warps": 4},
            **{"HAS_GAIN": given[0] is not None, "HAS_DECAY": given[1] is not None, "HAS_MASK": given[2] is not None},
        )

    def _absorb(self) -> None:
        """Compute the sums before each chunk."""
        x, m, e = self.g * self.b, self.m, self.e
        held = torch.bfloat16 if self.low else torch.float32
        self.sums = self.gain.new_empty(x, self.chunks + 1, m, e, dtype=held)
        self.masses = self.gain.new_empty(x, self.chunks + 1, m)
        self.exponents = self.origin.new_empty(x, self.chunks + 1, m)
        tiles = triton.cdiv(m, self.options["states"]["BM"])
        self.places = triton.next_power_of_2(tiles)
        self.spans = self.gain.new_zeros(x, self.chunks, self.places)
        self.after = torch.empty_like(self.state.sums)
        states.states[(x, tiles)](
            *(self.k, self.v, self.gain, self.origin, self.faded, self.documents, self.weight, self.rest, self.bias),
            *(self.state.sums.contiguous(), self.state.exponent.contiguous()),
            *(self.sums, self.masses, self.exponents, self.spans, self.after),
            *self.k.stride()[:3],
            *self.v.stride()[:3],
            **self.numbers,
            **self.sizes,
            **self.options["states"],
            TILES=self.places,
        )

    def both(self, kernel: Any, heads: int, *given: Any, **more: Any) -> None:
        """Launch a kernel over all chunks that fit their scale, and over all that are done pair by pair."""
        for exact, size in ((False, OPTIONS[kernel.__name__].rows), (True, EXACT_ROWS)):
            grid = (triton.cdiv(self.n, size), self.b * heads)
            kernel[grid](
                *given, **self.numbers, **self.sizes, **self.options[kernel.__name__], **more,
                R=self.h // self.g, TILES=self.places, EXACT=exact, BI=size,
            )  # fmt: skip


def attend(maps: Maps, tokens: Tokens, state: LinearState, *, keep: bool) -> Trace:
    """Attend to a sequence, as `sequence.attend` does; `keep` keeps the state before it alone."""
    run = Launch(maps, tokens, state)
    out = run.gain.new_empty(run.b, run.h, run.n, run.e)
    lse = run.origin.new_empty(run.b, run.h, run.n)
    run.both(
        outputs.outputs, run.h,
        *(run.q, run.k, run.v, run.gain, run.origin, run.faded, run.documents, run.weight, run.rest, run.bias),
        *(run.sums, run.masses, run.exponents, run.spans, out, lse),
        *run.q.stride()[:3], *run.k.stride()[:3], *run.v.stride()[:3],
        ALL=triton.next_power_of_2(run.m),
    )  # fmt: skip
    exponent = run.exponents[:, -1].masked_fill(run.after[..., -1] == 0, EMPTY)
    before = state.sums[None] if keep else state.sums.new_empty(0, *state.sums.shape)
    return Trace(out, lse, before.clone(), torch.stack([state.exponent, exponent]), run.after)


def pull(
    maps: Maps, tokens: Tokens, trace: Trace, grads: Sequence[Tensor | None]
) -> tuple[Tokens, Tensor, list[Tensor | None]]:
    """Return the gradients at tokens, the state's sums and the maps' tensors, as `sequence.pull` does; maps stay."""
    run = Launch(maps, tokens, LinearState(trace.sums[0], trace.exponents[0]))
    dout = torch.zeros_like(trace.out) if grads[0] is None else _rowwise(grads[0])
    delta = torch.empty_like(trace.mass, dtype=torch.float32)
    dmass = delta if grads[1] is None else grads[1].contiguous()
    states.pull_division[(run.chunks, run.b * run.h)](
        *(trace.out, dout, dmass, delta), *dout.stride()[:3], run.n, run.h,
        E=run.e, BE=run.sizes["BE"], C=CHUNK, HAS_MASS=grads[1] is not None,
    )  # fmt: skip
    dout = dout.to(run.v.dtype)  # as it came; loaded as it is multiplied, it lies in shared memory
    dafter = torch.zeros_like(trace.after) if grads[2] is None else grads[2].contiguous()
    x, rest = run.g * run.b, (run.gain, run.origin, run.faded, run.documents, run.weight, run.rest, run.bias)
    dstates = run.sums.new_empty(x, run.chunks, run.m, run.e)
    dmasses, dbefore = run.masses.new_empty(x, run.chunks, run.m), torch.empty_like(trace.after)
    states.pull_states[(x, triton.cdiv(run.m, run.options["pull_states"]["BM"]))](
        *(run.q, dout, delta, trace.mass, run.faded, run.documents, run.weight, run.rest, run.bias, run.exponents),
        *(dafter, dstates, dmasses, dbefore), *run.q.stride()[:3], *dout.stride()[:3],
        **run.numbers, **run.sizes, **run.options["pull_states"], R=run.h // run.g,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (run.q, run.k, run.v))
    dgain = torch.empty_like(run.gain)
    strides = (*run.q.stride()[:3], *run.k.stride()[:3], *run.v.stride()[:3], *dout.stride()[:3])
    given = (run.q, run.k, run.v, dout, delta, trace.mass, *rest)
    run.both(
        gradients.pull_queries, run.h, *given, run.sums, run.masses, run.exponents, run.spans, dq, *strides,
        scale=run.scale, ALL=triton.next_power_of_2(run.m),
    )  # fmt: skip
    run.both(
        gradients.pull_keys, run.g, *given, dstates, dmasses, run.exponents, run.spans, dk, dv, dgain, *strides,
        scale=run.scale, norm=run.norm,
    )  # fmt: skip
    lift = (run.exponents[:, 0] - trace.exponents[0]).to(dbefore.dtype)
    dsums = dbefore * torch.exp2(-lift)[..., None]
    log_gain = None if tokens.log_gain is None else dgain.to(tokens.log_gain.dtype)
    log_decay = None
    if tokens.log_decay is not None:
        log_decay = torch.empty_like(tokens.log_decay, memory_format=torch.contiguous_format)
        before = (dsums * trace.sums[0]).sum(dim=(1, 2))
        states.pull_decay[(run.b * run.g,)](dgain, before, log_decay, run.n, run.chunks, run.b, run.g, C=CHUNK)
    return Tokens(dq, dk, dv, log_gain, log_decay, None, None), dsums, [None] * len(maps.tensors)


def _rowwise(x: Tensor) -> Tensor:
    """Return x `(b, h, n, d)` with contiguous rows, those of a head so near each other that 32 bits tell them apart."""
    return x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()
