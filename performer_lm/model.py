"""The language model: tokens to logits, or tokens and a state to logits and the next state.

Letters: `b` batch, `n` tokens.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from performer_lm.nn.problems import Problems
from performer_lm.performer import Performer, PerformerState

Constructor = TypeVar("Constructor", bound=Callable[..., None])


def takes_options_of(part: type) -> Callable[[Constructor], Constructor]:
    """Let a constructor's `**options` stand for the parameters of another class, wherever signatures are read."""

    def extended(constructor: Constructor) -> Constructor:
        own = inspect.signature(constructor)
        kept = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        taken = inspect.signature(part).parameters.values()
        constructor.__signature__ = own.replace(parameters=[*kept, *taken])  # type: ignore[attr-defined]
        return constructor

    return extended


class PerformerLM(nn.Module):
    """A language model: an embedding, a `Performer`, and an output layer over the vocabulary.

    Causal, it predicts each next token; bidirectional (`causal=False`), masked ones.

    Args:
        vocab_size: number of token ids.
        tie_embeddings: whether the output layer shares the embedding's weight.
        head_bias: whether the output layer has a bias.
        options: all of `Performer`.

    Raises:
        ValueError: for sizes or options that do not fit together; all that is wrong, a line each.
    """

    @takes_options_of(Performer)
    def __init__(
        self, *, vocab_size: int, tie_embeddings: bool = False, head_bias: bool = False, **options: Any
    ) -> None:
        super().__init__()
        problems = Problems()
        problems.unless(vocab_size >= 1, f"vocab_size must be at least 1, got {vocab_size}")
        with problems.gathered():
            performer = Performer(**options)
        problems.raise_any()
        self.embedding = nn.Embedding(vocab_size, performer.dim)
        self.performer = performer
        self.head = nn.Linear(performer.dim, vocab_size, bias=head_bias)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        initialise_vocabulary(self.embedding, self.head)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict tokens: ids `(b, n)` to logits `(b, n, vocab)`.

        Args:
            tokens: `(b, n)` ids.
            mask: `(b, n)` bool, False at padding.
            segments: `(b, n)` ids of packed documents, which do not see one another.
            context: `(b, j, dim)` vectors that cross-attention looks at, where the model has it.
            context_mask: `(b, j)` bool, False at padding of the context.
        """
        return self.head(self.hidden(tokens, mask=mask, segments=segments, context=context, context_mask=context_mask))

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Return what the output layer reads, `(b, n, dim)`: a loss over many tokens need not hold all logits."""
        return self.performer(
            self.embedding(tokens), mask=mask, segments=segments, context=context, context_mask=context_mask
        )

    def init_state(
        self, batch: int, *, max_len: int = 0, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> PerformerState:
        """Return the state of `batch` streams before any token; `max_len` sizes caches and is no limit.

        Raises:
            ValueError: for a bidirectional model, or a context missing or without use.
        """
        return self.performer.init_state(batch, max_len=max_len, context=context, context_mask=context_mask)

    def extend(
        self, tokens: Tensor, state: PerformerState, *, mask: Tensor | None = None, last_only: bool = False
    ) -> tuple[Tensor, PerformerState]:
        """Append tokens to the streams: ids `(b, n)` to logits `(b, n, vocab)` and the next state.

        Any split of a sequence gives the logits that `forward` gives for the whole. May consume `state`.

        Args:
            tokens: `(b, n)` ids, for any n.
            state: of `init_state` or of an earlier call.
            mask: `(b, n)` bool, False at the padding that stands left of shorter prompts.
            last_only: return the logits of the last token alone, `(b, 1, vocab)`.
        """
        x, state = self.performer.extend(self.embedding(tokens), state, mask=mask)
        return self.head(x[:, -1:] if last_only else x), state

    def redraw(self, step: int) -> None:
        """Set every random projection to that of optimizer step `step`; call it between steps only."""
        self.performer.redraw(step)


def initialise_vocabulary(embedding: nn.Embedding, head: nn.Linear) -> None:
    """Set the initial weights of an embedding and an output layer; `normal(s)` has standard deviation s.

    | weight | initial values |
    |---|---|
    | embedding | normal(1): the stream starts at the scale that norms keep; tied to the output layer, normal(0.02) |
    | output layer | zeros (tied: the embedding): the first loss is ln(vocab) |
    """
    is_tied = head.weight is embedding.weight
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    nn.init.zeros_(head.weight)
    nn.init.normal_(embedding.weight, std=0.02 if is_tied else 1.0)
