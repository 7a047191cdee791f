"""Causal linear attention as `torch.compile` sees it: two operators, forward and backward, that it does not look into.

A compiler cannot follow the loop over blocks: on a CPU the host looks at values to choose a block's form. It knows
tensors, numbers and text only, so maps pass through as their tensors and their code.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `d` head width, `e` value width, `m` features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from performer_lm.ops.linear.sequence import Inputs, Trace, attend, cut, pull
from performer_lm.ops.linear.tokens import Maps, State

FIRST_STATE, FIRST_MAP = len(Inputs._fields), len(Inputs._fields) + len(State._fields)
FIXED = {Inputs._fields.index("mask"), Inputs._fields.index("documents"), FIRST_MAP - 1}  # the last is the exponent


def attend_compiled(maps: Maps, chunk_size: int, inputs: Inputs, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output `(b, h, n, e)`, the next sums and their exponents, as `CausalAttention` does."""
    leaves = [*inputs, *state, *maps.tensors]
    given = "".join("-" if leaf is None else "x" for leaf in leaves)
    there = [leaf for leaf in leaves if leaf is not None]
    keep = torch.is_grad_enabled()
    out, sums, exponents, *_ = _attend(there, given, maps.code, chunk_size, keep)
    return out.to(inputs.queries.dtype), sums, exponents[-1]


@torch.library.custom_op("performer_lm::causal_linear_attention", mutates_args=())
def _attend(
    leaves: Sequence[Tensor], given: str, code: str, chunk_size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the sums after, all exponents, denominators, the sums before each block and after, and forms.

    Args:
        leaves: inputs, state and the maps' tensors, as far as they are there.
        given: which of them are there: `x` or `-` for each.
        code: of the maps.
        chunk_size: tokens per block.
        keep: all states, for a backward, or the last alone.
    """
    inputs, state, maps = _take_apart(leaves, given, code)
    trace = attend(maps, chunk_size, inputs, state, keep=keep)
    return trace.out, trace.sums[-1].clone(), trace.exponents, trace.mass, trace.sums, trace.dense


@_attend.register_fake
def _(
    leaves: Sequence[Tensor], given: str, code: str, chunk_size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, state, _ = _take_apart(leaves, given, code)
    rows, blocks = inputs.queries.shape[:3], len(list(cut(inputs.queries.shape[2], chunk_size)))
    kept = 1 + blocks if keep else 1
    return (
        state.sums.new_empty(*rows, inputs.values.shape[-1]),
        torch.empty_like(state.sums),
        state.exponent.new_empty(kept, *state.exponent.shape),
        state.sums.new_empty(*rows, 1),
        state.sums.new_empty(kept, *state.sums.shape),
        torch.empty(blocks, dtype=torch.bool, device="cpu"),
    )


@torch.library.custom_op("performer_lm::pull_causal_linear_attention", mutates_args=())
def _pull(
    leaves: Sequence[Tensor],
    trace: Sequence[Tensor],
    grad: Tensor,
    grad_sums: Tensor,
    given: str,
    code: str,
    chunk_size: int,
    wanted: bool,
) -> list[Tensor]:
    """Return the gradients at those leaves that have one, in their order, contiguous: a compiler must know strides."""
    inputs, _, maps = _take_apart(leaves, given, code)
    found, sums, totals = pull(maps, chunk_size, inputs, Trace(*trace), grad, grad_sums, wanted=wanted)
    return [x.contiguous() for x in (*found, sums, *totals) if x is not None]


@_pull.register_fake
def _(
    leaves: Sequence[Tensor],
    trace: Sequence[Tensor],
    grad: Tensor,
    grad_sums: Tensor,
    given: str,
    code: str,
    chunk_size: int,
    wanted: bool,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, has in zip(leaves, _have_gradients(given, wanted), strict=True) if has]


def _take_apart(leaves: Sequence[Tensor], given: str, code: str) -> tuple[Inputs, State, Maps]:
    rest = iter(leaves)
    found = [next(rest) if mark == "x" else None for mark in given]
    parts: list[Any] = found  # what may be missing differs by field
    inputs, state = Inputs(*parts[:FIRST_STATE]), State(*parts[FIRST_STATE:FIRST_MAP])
    return inputs, state, Maps.decode(code, tuple(_last(leaves, len(given) - FIRST_MAP)))


def _last(leaves: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    return leaves[len(leaves) - count :]


def _have_gradients(given: str, wanted: bool) -> list[bool]:
    """Tell of each leaf that is there whether it has a gradient: masks, exponents and fixed maps have none."""
    return [place not in FIXED and (place < FIRST_MAP or wanted) for place, mark in enumerate(given) if mark == "x"]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    leaves, ctx.given, ctx.code, ctx.chunk_size, _ = inputs
    out, _, exponents, mass, sums, dense = output
    ctx.save_for_backward(*leaves, out, mass, sums, exponents, dense)


def _backward(ctx: Any, grad: Tensor, grad_sums: Tensor, *_: Tensor) -> tuple[Any, None, None, None, None]:
    saved = ctx.saved_tensors
    leaves, trace = list(saved[:-5]), list(saved[-5:])
    wanted = any(x.requires_grad for x in _last(leaves, len(ctx.given) - FIRST_MAP))
    found = iter(_pull(leaves, trace, grad, grad_sums, ctx.given, ctx.code, ctx.chunk_size, wanted))
    return [next(found) if has else None for has in _have_gradients(ctx.given, wanted)], None, None, None, None


_attend.register_autograd(_backward, setup_context=_keep)
