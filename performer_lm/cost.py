"""What a model costs, told before it is trained: parameters, arithmetic, memory, and where linear attention pays.

Models stand on the `meta` device here: shapes are worked out, nothing is computed.
Letters: `b` batch, `n` tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from performer_lm.attention.base import Attention, parts_of
from performer_lm.attention.chunked import ChunkedAttention
from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.flash import FlashAttention
from performer_lm.attention.flash_tiled import FlashTiledAttention
from performer_lm.attention.joining import count_bytes
from performer_lm.language_model import LanguageModel
from performer_lm.nn.attention import MultiHeadAttention
from performer_lm.objectives import Objective

LONGEST = 2048
"""Tokens up to which activations are counted where attention is a loop in Python, even on `meta`; it keeps them in
proportion to the tokens."""


class Size(NamedTuple):
    """The numbers that a model holds."""

    parameters: int
    embedding: int  # of the parameters, in tables of vectors by id; a tied one is the output layer as well
    trainable: int
    buffers: int


class BackendCost(NamedTuple):
    """The cost of one layer of a backend."""

    name: str
    flops: float  # a token's, at the context asked for
    state_bytes: int  # a sequence's, in float32, once it is as long as the context


class Cost(NamedTuple):
    """The cost of a model at a context."""

    size: Size
    flops: float  # a token's, in a forward; a training step does three times as much, recomputation left out
    backends: dict[BackendCost, int]  # and how many layers have it
    softmax: BackendCost | None  # the same heads under attn=flash, where some layer is linear
    activation_bytes: int  # what a float32 forward and the loss keep for the backward, of one sequence
    pays_from: int | None  # tokens from which on linear attention does less arithmetic than softmax


def measure_cost(model: LanguageModel, objective: Objective, *, context: int) -> Cost:
    """Count the cost of a model that learns `objective` from windows of `context` tokens.

    Args:
        model: on the meta device.
        objective: what it learns.
        context: tokens of a window.
    """
    layers = [body for body in model.modules() if isinstance(body, MultiHeadAttention)]
    backends: dict[BackendCost, int] = {}
    for body in layers:
        for backend in parts_of(body.backend):
            cost = _cost_of(backend, context, causal=body.causal)
            backends[cost] = backends.get(cost, 0) + 1
    linear = [
        (part, body.causal) for body in layers for part in parts_of(body.backend) if isinstance(part, FavorAttention)
    ]
    loops = any(isinstance(part, ChunkedAttention | FlashTiledAttention) for part in parts_of(model))
    counted = min(context, LONGEST) if loops else context
    return Cost(
        size=count_numbers(model),
        flops=model.count_flops(context) / context,
        backends=backends,
        softmax=_cost_of(_flash_like(linear[0][0]), context, causal=linear[0][1]) if linear else None,
        activation_bytes=round(count_activations(model, objective, tokens=counted) * context / counted),
        pays_from=find_crossover(*linear[0]) if linear else None,
    )


def count_numbers(model: nn.Module) -> Size:
    """Count parameters and buffers, shared ones once."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return Size(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=sum(p.numel() for p in tables),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        buffers=sum(b.numel() for b in model.buffers()),
    )


def count_activations(model: LanguageModel, objective: Objective, *, tokens: int) -> int:
    """Return the bytes that a forward over one window and its loss keep for the backward, parameters left out."""
    held: dict[int, torch.UntypedStorage] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage
        return saved

    windows = torch.zeros(1, tokens + 1, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved), _Fused():
        losses = objective(model.train(), windows, step=0)
    total = sum(storage.nbytes() for storage in held.values())
    del losses
    return total


def find_crossover(backend: FavorAttention, causal: bool) -> int:
    """Return the length from which on a linear backend does less arithmetic than softmax over the same heads."""
    flash = _flash_like(backend)

    def pays(n: int) -> bool:
        return backend.count_flops(n, n, causal=causal) < flash.count_flops(n, n, causal=causal)

    high = 1
    while not pays(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


class _Fused(TorchFunctionMode):
    """Keeps of softmax attention what a fused kernel keeps; on `meta`, PyTorch takes one that keeps all scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Kept.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _cost_of(backend: Attention[Any], context: int, *, causal: bool) -> BackendCost:
    device = torch.device("meta")
    state = backend.init_state(1, max_len=context, device=device, dtype=torch.float32)
    flops = backend.count_flops(context, context, causal=causal) / context
    return BackendCost(backend.choice, flops, count_bytes(state))


def _flash_like(backend: Attention[Any]) -> FlashAttention:
    return FlashAttention(**backend.sizes)
