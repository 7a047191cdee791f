"""The errors of random features against softmax in every layer of a model, on the vectors of a real forward.

Letters: `b` batch, `n` tokens, `h` heads.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from performer_lm.attention.favor import FavorAttention
from performer_lm.evaluation.approximation.layer import Approximation, measure_approximation
from performer_lm.ranges import Count, ranged

Vectors = tuple[Tensor, Tensor, Tensor]
Look = Callable[[str, FavorAttention, Vectors, dict[str, Any]], None]
"""Called with a layer's name, its backend and the arguments of its forward: q, k, v, `causal` and options by name."""
_PLACE = re.compile(r"(?:\b(encoder|decoder)\.)?\blayers\.(\d+)\.(cross_)?attention\.")


@ranged
def diagnose(
    model: nn.Module, tokens: Tensor, *, queries: Count | None = 64, **options: Any
) -> dict[str, Approximation]:
    """Compare FAVOR with softmax in every layer that runs it, on the vectors that the model makes of `tokens`.

    Queries, keys and values are those that attention receives: after convolution, norms and positions, with the
    model's decay. The model and its mode stay as they are; no gradient is recorded. It takes a forward and, for each
    layer, O(queries n m) time; memory does not grow with m or with the number of layers.

    Args:
        model: any that holds `FavorAttention`, among other backends or not; called as `model(tokens, **options)`.
        tokens: `(b, n)` ids.
        queries: how many tokens' attention to look at, evenly spaced over the sequence; None for all.
        options: further arguments of the model's forward, `mask` for example.

    Returns:
        By layer, as `favor_layers` names them, the findings `(h,)` over its FAVOR heads; empty without FAVOR.
    """
    found: dict[str, Approximation] = {}

    def look(layer: str, attention: FavorAttention, vectors: Vectors, more: dict[str, Any]) -> None:
        found[layer] = measure_approximation(attention, *vectors, queries=queries, **more)

    watch(model, look, lambda: model(tokens, **options))
    return found


def favor_layers(model: nn.Module) -> dict[str, FavorAttention]:
    """Return a model's FAVOR backends in the order they run: `layer0`, `encoder/layer0`, `decoder/layer0/cross`."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, FavorAttention)}
    return {_place(name): module for name, module in found.items()}


def _place(name: str) -> str:
    found = _PLACE.search(name)
    if found is None:
        return name
    stack, layer, cross = found.groups()
    return "/".join(part for part in (stack, f"layer{layer}", "cross" if cross else None) if part)


def watch(model: nn.Module, look: Look, run: Callable[[], object]) -> None:
    """Run the model by `run`, in evaluation mode without gradients, and show `look` the input of each FAVOR backend."""
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_evaluating(model))
        for layer, attention in favor_layers(model).items():
            hook = attention.register_forward_pre_hook(partial(_show, look, layer), with_kwargs=True)
            stack.callback(hook.remove)
        run()


def _show(look: Look, layer: str, attention: FavorAttention, vectors: Any, more: dict[str, Any]) -> None:
    look(layer, attention, vectors, more)


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
