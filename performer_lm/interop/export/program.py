"""A model as programs of `torch.export`: its forward, and one step of decoding, for any batch and length.

Such a program runs without this package's Python, saved by `torch.export.save`; linear backends and the delta rule are
operators of this package in it, so that it is imported where those are loaded.

Letters: `b` batch, `n` tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from performer_lm.language_model import LanguageModel
from performer_lm.performer import PerformerState

BATCH, TOKENS = 3, 64  # of the examples that are traced


class Step(nn.Module):
    """One step of decoding: ids `(b, 1)` and a state to logits `(b, 1, vocab)` and the next state."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: PerformerState) -> tuple[Tensor, PerformerState]:
        """Append a token to each stream."""
        return self.model.extend(tokens, state)


def export_forward(model: nn.Module) -> ExportedProgram:
    """Return the program of ids `(b, n)` to logits `(b, n, vocab)`, for any b and n.

    The shortest n is 2, or the taps of the convolution.

    Args:
        model: a causal language model in evaluation mode, with attn=flash, local, favor, relu, linear, delta or a
            hybrid of them.
    """
    tokens = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    with torch.no_grad():
        return torch.export.export(model, (tokens,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))


def export_step(model: LanguageModel) -> ExportedProgram:
    """Return the program of `Step`, for any b.

    Raises:
        ValueError: for a model whose state grows with the text, as softmax's does.
    """
    tokens = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    with torch.no_grad():
        _, state = model.start(tokens)
        if not all(isinstance(leaf, Tensor | None) for leaf in tree_leaves(state)):
            raise ValueError("a cache of keys grows with the text: export_step takes favor, relu, linear, delta, local")
        shapes: Any = tree_map(lambda leaf: None if leaf is None else {0: Dim.DYNAMIC}, state)
        return torch.export.export(Step(model), (tokens[:, :1], state), dynamic_shapes=({0: Dim.DYNAMIC}, shapes))
