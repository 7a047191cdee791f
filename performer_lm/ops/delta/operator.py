"""The delta rule as PyTorch sees it: an operator with a gradient, which no compiler looks into.

The loop over blocks works in memory of its own, so autograd and `torch.compile` take it whole. Feature maps pass
through as their tensors and their code.

Letters: `b` batch, `h` heads, `n` tokens, `x` batch times key heads, `e` value width, `m` features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from performer_lm.ops.delta.blocks import Writes
from performer_lm.ops.delta.sequence import attend, pull
from performer_lm.ops.linear.state import Geometry
from performer_lm.ops.linear.tokens import cut
from performer_lm.ops.maps import Maps
from performer_lm.ops.precision import no_autocast


def run(maps: Maps, geometry: Geometry, tokens: Writes, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Write and read a sequence from a memory `(x, m, e)`, with gradients: the output and the memory after it."""
    leaves = (*tokens[:5], memory, *maps.tensors)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    tile, block, in_place, _ = geometry
    in_place = in_place or memory.shape[1] > 4 * tile  # else each tile takes a matrix of m^2 numbers
    out, *_, after = _attend(*tokens, memory, maps.tensors, maps.code, tile, block, in_place, keep)
    return out, after


@torch.library.custom_op("performer_lm::delta_rule", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    mask: Tensor | None,
    documents: Tensor | None,
    memory: Tensor,
    tensors: Sequence[Tensor],
    code: str,
    tile: int,
    block: int,
    in_place: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the errors and the memory before each block if they are to be kept, and that at the end."""
    tokens = Writes(q, k, v, beta, log_decay, mask, documents)
    with no_autocast(q.device):  # here, as compiled callers cannot set it
        return attend(Maps.decode(code, tuple(tensors)), Geometry(tile, block, in_place), tokens, memory, keep=keep)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    memory, (tile, block, _, keep) = rest[4], rest[-4:]
    blocks = len(list(cut(q.shape[2], block, tile))) if keep else 0
    out, errors = (memory.new_empty(*x.shape[:2], n, v.shape[-1]) for x, n in ((q, q.shape[2]), (k, keep * k.shape[2])))
    return out, errors, memory.new_empty(blocks, *memory.shape), torch.empty_like(memory)


@torch.library.custom_op("performer_lm::pull_delta_rule", mutates_args=())
def _pull(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    mask: Tensor | None,
    documents: Tensor | None,
    trace: Sequence[Tensor],
    grad: Tensor | None,
    grad_memory: Tensor | None,
    tensors: Sequence[Tensor],
    code: str,
    tile: int,
    block: int,
    in_place: bool,
    wanted: bool,
) -> list[Tensor]:
    """Return the gradients at q, k, v, beta, log_decay if it is there, the memory, and if wanted at the tensors."""
    tokens, maps = Writes(q, k, v, beta, log_decay, mask, documents), Maps.decode(code, tuple(tensors))
    out, errors, kept, after = trace
    with no_autocast(q.device):
        found, memory, totals = pull(
            maps,
            Geometry(tile, block, in_place),
            tokens,
            (out, errors, kept, after),
            grad,
            grad_memory,
            wanted=wanted,
        )
    return [x.contiguous() for x in (*found, memory, *totals) if x is not None]


@_pull.register_fake
def _(*given: Any) -> list[Tensor]:
    (*at_tokens, _, _), trace, tensors, wanted = given[:7], given[7], given[10], given[-1]
    found = [x for x in at_tokens if x is not None] + [trace[-1], *(tensors if wanted else [])]
    return [x.new_empty(x.shape) for x in found]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *given, tensors, ctx.code, ctx.tile, ctx.block, ctx.in_place, _ = inputs
    ctx.count = len(tensors)
    ctx.mark_non_differentiable(*output[1:3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given[:7], *tensors, *output)


def _backward(ctx: Any, grad: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    given, tensors, trace = saved[:7], list(saved[7 : 7 + ctx.count]), list(saved[7 + ctx.count :])
    wanted = any(x.requires_grad for x in tensors)
    geometry = (ctx.tile, ctx.block, ctx.in_place)
    found = iter(_pull(*given, trace, grad, rest[-1], tensors, ctx.code, *geometry, wanted))
    at_tokens = [next(found) if x is not None else None for x in given[:5]]
    return (*at_tokens, None, None, next(found), list(found) if wanted else [None] * ctx.count, *[None] * 5)


_attend.register_autograd(_backward, setup_context=_keep)
