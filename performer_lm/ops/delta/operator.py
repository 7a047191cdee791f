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
    out, _, after = _attend(*tokens, memory, maps.tensors, maps.code, *geometry[:2], keep)
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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the memory before each block if they are to be kept, and that after the last."""
    tokens = Writes(q, k, v, beta, log_decay, mask, documents)
    with no_autocast(q.device):  # here, as compiled callers cannot set it
        return attend(Maps.decode(code, tuple(tensors)), Geometry(tile, block, True), tokens, memory, keep=keep)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    memory, (tile, block, keep) = rest[4], rest[-3:]
    blocks = len(list(cut(q.shape[2], block, tile))) if keep else 0
    out = memory.new_empty(*q.shape[:3], v.shape[-1])
    return out, memory.new_empty(blocks, *memory.shape), torch.empty_like(memory)


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
    wanted: bool,
) -> list[Tensor]:
    """Return the gradients at q, k, v, beta, log_decay if it is there, the memory, and if wanted at the tensors."""
    tokens, maps = Writes(q, k, v, beta, log_decay, mask, documents), Maps.decode(code, tuple(tensors))
    out, kept, after = trace
    with no_autocast(q.device):
        found, memory, totals = pull(
            maps, Geometry(tile, block, True), tokens, (out, kept, after), grad, grad_memory, wanted=wanted
        )
    return [x.contiguous() for x in (*found, memory, *totals) if x is not None]


@_pull.register_fake
def _(*given: Any) -> list[Tensor]:
    (*at_tokens, _, _), trace, tensors, wanted = given[:7], given[7], given[10], given[-1]
    found = [x for x in at_tokens if x is not None] + [trace[2], *(tensors if wanted else [])]
    return [x.new_empty(x.shape) for x in found]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *given, tensors, ctx.code, ctx.tile, ctx.block, _ = inputs
    ctx.count = len(tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given[:7], *tensors, *output)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None, grad_memory: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    given, tensors, trace = saved[:7], list(saved[7 : 7 + ctx.count]), list(saved[7 + ctx.count :])
    wanted = any(x.requires_grad for x in tensors)
    found = iter(_pull(*given, trace, grad, grad_memory, tensors, ctx.code, ctx.tile, ctx.block, wanted))
    at_tokens = [next(found) if x is not None else None for x in given[:5]]
    return (*at_tokens, None, None, next(found), list(found) if wanted else [None] * ctx.count, *[None] * 4)


_attend.register_autograd(_backward, setup_context=_keep)
