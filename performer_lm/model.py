"""The language model: tokens to logits, or tokens and a state to logits and the next state.

Letters: `b` batch, `n` tokens.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from performer_lm.language_model import LanguageModel, initialise_vocabulary
from performer_lm.ops.checks import check_mask
from performer_lm.performer import Performer, PerformerState
from performer_lm.ranges import Count, ranged

Constructor = TypeVar("Constructor", bound=Callable[..., None])


def takes_options_of(part: type) -> Callable[[Constructor], Constructor]:
    """Show the parameters of another class in place of a constructor's `**options`, wherever signatures are read."""

    def extended(constructor: Constructor) -> Constructor:
        own = inspect.signature(constructor)
        kept = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        taken = inspect.signature(part).parameters.values()
        constructor.__signature__ = own.replace(parameters=[*kept, *taken])  # type: ignore[attr-defined]
        return constructor

    return extended


@ranged
class PerformerLM(LanguageModel):
    """A language model: an embedding, a `Performer`, and an output layer over the vocabulary.

    Causal, it predicts each next token; bidirectional (`causal=False`), masked ones.

    Args:
        vocab_size: number of token ids.
        tie_embeddings: whether the output layer shares the embedding's weight.
        head_bias: whether the output layer has a bias.
        options: all of `Performer`.

    Raises:
        ValueError: for the first sizes or options that do not fit together.
    """

    @takes_options_of(Performer)
    def __init__(
        self, *, vocab_size: Count, tie_embeddings: bool = False, head_bias: bool = False, **options: Any
    ) -> None:
        super().__init__()
        performer = Performer(**options)
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
            mask: `(b, n)` bool or integer, False or 0 at padding.
            segments: `(b, n)` ids of packed documents, which do not see one another.
            context: `(b, j, dim)` vectors that cross-attention looks at, where the model has it.
            context_mask: `(b, j)` like mask, False at padding of the context.
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
        """Return the vectors that the output layer reads, `(b, n, dim)`, for a loss that never holds all logits."""
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

    @property
    def decodes(self) -> bool:
        """Whether the model can write text: causal, and without a context, which a prompt does not hold."""
        return self.performer.causal and not self.performer.cross_attend

    def room_after(self, tokens: int) -> int | None:
        """Return the number of new tokens that the positions tell apart after a prompt; None: no limit."""
        last = self.performer.max_len
        return None if last is None else max(0, last - tokens + 1)  # the last new token is never read

    def check_prompt(self, prompt: Tensor, mask: Tensor | None) -> Tensor | None:
        """Check prompts and mask; see `LanguageModel.check_prompt`.

        Raises:
            ValueError: for a row without tokens or padded on the right, whose last logits would be a pad's; or padded
                between tokens, where a convolution or token shift would see zeros.
        """
        mask = check_mask(mask, prompt.shape)
        if not prompt.shape[1]:
            raise ValueError("a prompt needs at least 1 token, such as the one that begins a document; got none")
        if mask is not None and not mask.is_meta:
            _check_padding(mask, may_have_gaps=not self.performer.mixes_neighbours)
        return mask

    def start(self, prompt: Tensor, *, mask: Tensor | None = None, max_len: int = 0) -> tuple[Tensor, PerformerState]:
        """Read prompts before new tokens; see `LanguageModel.start`."""
        mask = self.check_prompt(prompt, mask)
        return self.read(prompt, self.init_state(prompt.shape[0], max_len=max_len), mask=mask)

    def extend(
        self, tokens: Tensor, state: PerformerState, *, mask: Tensor | None = None, last_only: bool = False
    ) -> tuple[Tensor, PerformerState]:
        """Append tokens to the streams; see `LanguageModel.extend`."""
        x, state = self.performer.extend(self.embedding(tokens), state, mask=mask)
        return self.head(x[:, -1:] if last_only else x), state

    def count_flops(self, tokens: int) -> int:
        """Return the arithmetic of a forward over a window of `tokens`, matrix products only."""
        return self.performer.count_flops(tokens) + 2 * tokens * self.head.weight.numel()


def _check_padding(mask: Tensor, *, may_have_gaps: bool) -> None:
    """Raise ValueError unless the padding of prompts, False in the mask `(b, n)`, stands on the left."""
    if not bool(mask.any(1).all()):
        raise ValueError(
            "a prompt is all padding: each row needs at least 1 token, such as the one that begins a document"
        )
    if not bool(mask[:, -1].all()):
        raise ValueError("a prompt ends in padding, which would be continued as if it were text: pad on the left")
    if not may_have_gaps and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError(
            "a prompt has padding between its tokens, where the convolution or token shift would see zeros: "
            "pad on the left"
        )
