"""How well random features stand in for softmax in a model, layer by layer, on the vectors of a real forward.

Letters: `b` batch, `n` tokens, `h` heads.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from performer_lm.attention.favor import FavorAttention
from performer_lm.evaluation.approximation import Approximation, measure_approximation

Look = Callable[[FavorAttention, tuple[Tensor, Tensor, Tensor], dict[str, Any]], None]
"""Called with a backend and with the arguments of its forward: q, k, v, and `causal` and options by name."""


def diagnose(model: nn.Module, tokens: Tensor, *, queries: int | None = 64, **options: Any) -> dict[int, Approximation]:
    """Compare FAVOR with softmax in every layer that runs it, on what the model makes of `tokens`.

    Queries, keys and values are those that attention receives: after convolution, norms and positions, with the
    model's decay. Nothing of the model changes, its mode included; no gradient is recorded. It takes a forward and,
    for each layer, O(queries n m) time; memory does not grow with m or with the number of layers.

    Args:
        model: any that holds `FavorAttention`, among other backends or not; called as `model(tokens, **options)`.
        tokens: `(b, n)` ids.
        queries: how many tokens' attention to look at, evenly spaced over the sequence; None for all.
        options: what else the model's forward takes, `mask` for example.

    Returns:
        By the backend's number of a layer (cross-attention counts on after the last layer), the findings `(h,)` over
        its FAVOR heads. Empty for a model without FAVOR.
    """
    found: dict[int, Approximation] = {}

    def look(attention: FavorAttention, vectors: tuple[Tensor, Tensor, Tensor], more: dict[str, Any]) -> None:
        found[attention.layer] = measure_approximation(attention, *vectors, queries=queries, **more)

    watch(model, tokens, look, **options)
    return found


def watch(model: nn.Module, tokens: Tensor, look: Look, **options: Any) -> None:
    """Run a forward in evaluation mode, without gradients, and show `look` the inputs of every FAVOR backend."""
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_evaluating(model))
        for module in model.modules():
            if isinstance(module, FavorAttention):
                hook = module.register_forward_pre_hook(partial(_show, look), with_kwargs=True)
                stack.callback(hook.remove)
        model(tokens, **options)


def _show(look: Look, attention: FavorAttention, vectors: Any, more: dict[str, Any]) -> None:
    look(attention, vectors, more)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every part of it back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
