"""Causal linear attention as PyTorch sees it: an operator with a gradient, which no compiler looks into.

The loop over blocks looks at values, to see whether a block's features fit its form, and works in memory of its own,
so autograd and `torch.compile` take it whole. An operator knows tensors, numbers and text only: feature maps pass
through as their tensors and their code, and what is not given is left out of the list.

Letters: `b` batch, `h` heads, `n` tokens, `x` batch times key heads, `e` value width, `m` features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.ops.linear.sequence import Trace, attend, pull
from performer_lm.ops.linear.state import Geometry, LinearState, choose_geometry
from performer_lm.ops.linear.tokens import Tokens, count_parts
from performer_lm.ops.linear.triton import Kernel, takes_triton
from performer_lm.ops.maps import Maps
from performer_lm.ops.precision import no_autocast

FIRST_STATE, FIRST_MAP = len(Tokens._fields), len(Tokens._fields) + len(LinearState._fields)
FIXED = {Tokens._fields.index("mask"), Tokens._fields.index("documents"), FIRST_MAP - 1}  # the last is the exponent


def run(
    maps: Maps, tokens: Tokens, state: LinearState, chunk_size: int | None, kernel: Kernel = "torch"
) -> tuple[Trace, LinearState]:
    """Attend to a sequence from a state `(b, g, ...)`, with gradients: its trace and the state after it."""
    geometry = choose_geometry(state.sums, block=chunk_size)._replace(triton=takes_triton(kernel, maps, tokens))
    sums, exponent = rearrange(state.sums, "b g m e -> (g b) m e"), rearrange(state.exponent, "b g m -> (g b) m")
    leaves, given, keep = [], "", False
    for leaf in (*tokens, sums, exponent, *maps.tensors):
        given += "-" if leaf is None else "x"
        if leaf is not None:
            leaves.append(leaf)
            keep = keep or leaf.requires_grad
    trace = Trace(*_attend(leaves, given, maps.code, *geometry, keep and torch.is_grad_enabled()))
    after = (trace.after, trace.exponents[-1])
    return trace, LinearState(*(rearrange(x, "(g b) ... -> b g ...", b=state.sums.shape[0]) for x in after))


@torch.library.custom_op("performer_lm::causal_linear_attention", mutates_args=())
def _attend(
    leaves: Sequence[Tensor], given: str, code: str, tile: int, block: int, one_scale: bool, triton: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of a `Trace`.

    Args:
        leaves: tokens, state and the maps' tensors, as far as they are there.
        given: which of them are there: `x` or `-` for each.
        code: of the maps.
        tile: of the geometry, like block and one_scale.
        block: tokens worked on at once.
        one_scale: whether tiles share a scale.
        triton: whether kernels do it.
        keep: all states, for a backward.
    """
    tokens, state, maps = _take_apart(leaves, given, code)
    if triton:
        from performer_lm.ops.linear.triton import launch

        return launch.attend(maps, tokens, state, keep=keep)[:]
    with no_autocast(leaves[0].device):  # here, as compiled callers cannot set it
        return attend(maps, Geometry(tile, block, one_scale), tokens, state, keep=keep)[:]


@_attend.register_fake
def _(
    leaves: Sequence[Tensor], given: str, code: str, tile: int, block: int, one_scale: bool, triton: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, (sums, exponent), _ = _take_apart(leaves, given, code)
    rows, blocks = tokens.queries.shape[:3], 1 if triton else count_parts(tokens.queries.shape[2], block, tile)
    return (
        sums.new_empty(*rows, tokens.values.shape[-1]),
        exponent.new_empty(rows),
        sums.new_empty(blocks if keep else 0, *sums.shape),
        exponent.new_empty(1 + blocks, *exponent.shape),
        torch.empty_like(sums),
    )


@torch.library.custom_op("performer_lm::pull_causal_linear_attention", mutates_args=())
def _pull(
    leaves: Sequence[Tensor],
    trace: Sequence[Tensor],
    grads: Sequence[Tensor],
    given: str,
    pulled: str,
    code: str,
    tile: int,
    block: int,
    one_scale: bool,
    triton: bool,
    wanted: bool,
) -> list[Tensor]:
    """Return the gradients at those leaves that have one, in their order, contiguous: a compiler must know strides."""
    tokens, _, maps = _take_apart(leaves, given, code)
    rest = iter(grads)
    each = [next(rest) if mark == "x" else None for mark in pulled]
    if triton:
        from performer_lm.ops.linear.triton import launch

        found, sums, totals = launch.pull(maps, tokens, Trace(*trace), each)
    else:
        with no_autocast(leaves[0].device):
            geometry = Geometry(tile, block, one_scale)
            found, sums, totals = pull(maps, geometry, tokens, Trace(*trace), each, wanted=wanted)
    return [x.contiguous() for x in (*found, sums, *totals) if x is not None]


@_pull.register_fake
def _(
    leaves: Sequence[Tensor], trace: Sequence[Tensor], grads: Sequence[Tensor], given: str, *rest: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, has in zip(leaves, _have_gradients(given, rest[-1]), strict=True) if has]


def _take_apart(leaves: Sequence[Tensor], given: str, code: str) -> tuple[Tokens, LinearState, Maps]:
    rest, found = iter(leaves), list[Any]()
    for mark in given:
        found.append(next(rest) if mark == "x" else None)
    tokens, state = Tokens(*found[:FIRST_STATE]), LinearState(*found[FIRST_STATE:FIRST_MAP])
    return tokens, state, Maps.decode(code, tuple(found[FIRST_MAP:]))


def _have_gradients(given: str, wanted: bool) -> list[bool]:
    """Return True for each leaf that is there and has a gradient: masks, exponents and fixed maps have none."""
    return [place not in FIXED and (place < FIRST_MAP or wanted) for place, mark in enumerate(given) if mark == "x"]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    leaves, ctx.given, ctx.code, *ctx.geometry, _ = inputs
    ctx.count = len(leaves)
    ctx.mark_non_differentiable(*output[2:4])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*leaves, *output)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: recomputation gives them away
    leaves, trace = list(saved[: ctx.count]), list(saved[ctx.count :])
    wanted = any(x.requires_grad for x in leaves[len(leaves) - len(ctx.given) + FIRST_MAP :])
    each = (grads[0], grads[1], grads[-1])
    pulled = "".join("-" if grad is None else "x" for grad in each)
    settings = (ctx.given, pulled, ctx.code, *ctx.geometry, wanted)
    found = iter(_pull(leaves, trace, [grad for grad in each if grad is not None], *settings))
    return [next(found) if has else None for has in _have_gradients(ctx.given, wanted)], *[None] * 7


_attend.register_autograd(_backward, setup_context=_keep)
