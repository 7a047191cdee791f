"""The contract of language models: training on tokens, and writing text token by token.

Letters: `b` batch, `n` tokens.
"""

from abc import ABC, abstractmethod
from typing import Final

from torch import Tensor, nn

from performer_lm.attention.favor import Redrawable
from performer_lm.performer import PerformerState

READ_AT_ONCE: Final = 2048  # tokens of a row: the memory of a prompt of any length is that of as many


class LanguageModel(Redrawable, ABC):
    """A model over a vocabulary, with an embedding of tokens and an output layer."""

    embedding: nn.Embedding
    head: nn.Linear

    @property
    @abstractmethod
    def decodes(self) -> bool:
        """Whether the model can write text: whether `start` and `extend` work."""

    @abstractmethod
    def room_after(self, tokens: int) -> int | None:
        """Return the largest number of new tokens after a prompt of `tokens`; None: no limit."""

    @abstractmethod
    def check_prompt(self, prompt: Tensor, mask: Tensor | None) -> Tensor | None:
        """Check that prompts `(b, n)` can be continued, and return the mask as bool; reads the values of the mask.

        Raises:
            ValueError: for a mask of another shape or dtype, or padding that would be read as text.
        """

    @abstractmethod
    def start(self, prompt: Tensor, *, mask: Tensor | None = None, max_len: int = 0) -> tuple[Tensor, PerformerState]:
        """Read prompts: ids `(b, n)` to the logits of the first new token, `(b, 1, vocab)`, and the state.

        Args:
            prompt: `(b, n)` ids.
            mask: `(b, n)` bool or integer, False or 0 at the padding that stands left of shorter prompts.
            max_len: how many tokens are to be decoded, prompt included; sizes caches and is no limit.

        Raises:
            ValueError: for a model that does not decode, or prompts that `check_prompt` refuses.
        """

    @abstractmethod
    def extend(
        self, tokens: Tensor, state: PerformerState, *, mask: Tensor | None = None, last_only: bool = False
    ) -> tuple[Tensor, PerformerState]:
        """Append tokens to the streams: ids `(b, n)` to logits `(b, n, vocab)` and the next state.

        Any split of a sequence gives the logits that a forward gives for the whole. May consume `state`.

        Args:
            tokens: `(b, n)` ids, for any n, 0 among them.
            state: of `start`, `init_state` or an earlier call.
            mask: `(b, n)` bool or integer, of these tokens alone: False or 0 at padding on the left.
            last_only: return the logits of the last token alone, `(b, 1, vocab)`.

        Raises:
            ValueError: for a mask that is not of these tokens, or a state of another batch.
        """

    def read(
        self, tokens: Tensor, state: PerformerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, PerformerState]:
        """Append tokens as `extend` does, in parts: ids `(b, n)` to the last logits `(b, 1, vocab)` and the state.

        Memory is that of a few thousand tokens and of the state, for any n of at least 1.
        """
        for start in range(0, tokens.shape[1], READ_AT_ONCE):
            part = slice(start, start + READ_AT_ONCE)
            logits, state = self.extend(
                tokens[:, part], state, mask=None if mask is None else mask[:, part], last_only=True
            )
        return logits, state

    @abstractmethod
    def count_flops(self, tokens: int) -> int:
        """Return the arithmetic of a forward over a window of `tokens`, matrix products only."""


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
