"""The encoder-decoder: a bidirectional stack reads a source, a causal one writes a target while looking at the source.

Letters: `b` batch, `n` tokens of the target, `j` tokens of the source.
"""

from collections.abc import Callable

from torch import Tensor, nn

from performer_lm.language_model import LanguageModel, initialise_vocabulary
from performer_lm.ops.checks import check_mask
from performer_lm.performer import Performer, PerformerState
from performer_lm.ranges import Count, Whole, ranged


@ranged
class PerformerEncoderDecoder(LanguageModel):
    """Predict a target from a source: `encoder` bidirectional, `decoder` causal with cross-attention.

    Decoding reads the source once; the decoder's state holds the keys and values of the source, which for FAVOR has
    one size for any source.

    Args:
        vocab_size: number of token ids of the target, and of the source unless `source_vocab_size` is given.
        dim: width of both streams.
        encoder: factory of the encoder, called with dim; bidirectional.
        decoder: factory of the decoder, called with dim; causal, with cross-attention.
        source_vocab_size: number of the source's token ids, with an embedding of its own; None shares the target's.
        tie_embeddings: whether the output layer shares the target embedding's weight.
        head_bias: whether the output layer has a bias.
        start_id: the id that a target starts with; None takes the last, which ends documents.

    Raises:
        ValueError: for the first sizes or options that do not fit together.
    """

    def __init__(
        self,
        *,
        vocab_size: Count,
        dim: Count,
        encoder: Callable[..., Performer],
        decoder: Callable[..., Performer],
        source_vocab_size: Count | None = None,
        tie_embeddings: bool = False,
        head_bias: bool = False,
        start_id: Whole | None = None,
    ) -> None:
        super().__init__()
        self.start_id = vocab_size - 1 if start_id is None else start_id
        if self.start_id >= vocab_size:
            raise ValueError(f"start_id must be within 0..{vocab_size - 1}, got {self.start_id}")
        self.encoder = encoder(dim=dim)
        if self.encoder.causal:
            raise ValueError("the encoder must be bidirectional: set encoder.causal to false")
        if self.encoder.cross_attend:
            raise ValueError("the encoder has nothing to look at: set encoder.cross_attend to false")
        self.decoder = decoder(dim=dim)
        if not self.decoder.causal:
            raise ValueError("the decoder must be causal: set decoder.causal to true")
        if not self.decoder.cross_attend:
            raise ValueError("the decoder would never see the source: set decoder.cross_attend to true")
        self.embedding = nn.Embedding(vocab_size, dim)
        self.source_embedding = self.embedding
        if source_vocab_size is not None:
            self.source_embedding = nn.Embedding(source_vocab_size, dim)
            nn.init.normal_(self.source_embedding.weight)
        self.head = nn.Linear(dim, vocab_size, bias=head_bias)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        initialise_vocabulary(self.embedding, self.head)

    def forward(
        self, source: Tensor, target: Tensor, *, mask: Tensor | None = None, source_mask: Tensor | None = None
    ) -> Tensor:
        """Predict the target's next tokens: ids `(b, j)` and `(b, n)` to logits `(b, n, vocab)`.

        Args:
            source: `(b, j)` ids.
            target: `(b, n)` ids, from `start_id` on.
            mask: `(b, n)` bool or integer, False or 0 at the target's padding.
            source_mask: `(b, j)` like mask, at the source's.
        """
        return self.head(self.hidden(source, target, mask=mask, source_mask=source_mask))

    def hidden(
        self, source: Tensor, target: Tensor, *, mask: Tensor | None = None, source_mask: Tensor | None = None
    ) -> Tensor:
        """Return the vectors that the output layer reads, `(b, n, dim)`."""
        source_mask = check_mask(source_mask, source.shape, name="source_mask")
        context = self.encode(source, mask=source_mask)
        return self.decoder(self.embedding(target), mask=mask, context=context, context_mask=source_mask)

    def encode(self, source: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Read the source: ids `(b, j)` to vectors `(b, j, dim)`."""
        return self.encoder(self.source_embedding(source), mask=mask)

    def init_state(self, source: Tensor, *, mask: Tensor | None = None, max_len: int = 0) -> PerformerState:
        """Read a source `(b, j)` and return the state of targets before any token."""
        context = self.encode(source, mask=mask)
        return self.decoder.init_state(source.shape[0], max_len=max_len, context=context, context_mask=mask)

    @property
    def decodes(self) -> bool:
        """True: an encoder-decoder always writes text."""
        return True

    def room_after(self, tokens: int) -> int | None:
        """Return the number of target tokens that the positions tell apart; None: no limit."""
        return self.decoder.max_len

    def check_prompt(self, prompt: Tensor, mask: Tensor | None) -> Tensor | None:
        """Check the mask of sources, whose padding may stand anywhere; see `LanguageModel.check_prompt`."""
        return check_mask(mask, prompt.shape)

    def start(self, prompt: Tensor, *, mask: Tensor | None = None, max_len: int = 0) -> tuple[Tensor, PerformerState]:
        """Read prompts as sources; targets start with `start_id`. See `LanguageModel.start`."""
        state = self.init_state(prompt, mask=mask, max_len=max_len)
        return self.extend(prompt.new_full((prompt.shape[0], 1), self.start_id), state)

    def extend(
        self, tokens: Tensor, state: PerformerState, *, mask: Tensor | None = None, last_only: bool = False
    ) -> tuple[Tensor, PerformerState]:
        """Append tokens to the targets; see `LanguageModel.extend`."""
        x, state = self.decoder.extend(self.embedding(tokens), state, mask=mask)
        return self.head(x[:, -1:] if last_only else x), state

    def count_flops(self, tokens: int) -> int:
        """Return the arithmetic of a forward over a window of so many tokens, the first half of them the source."""
        source, target = (tokens + 1) // 2, tokens // 2
        stacks = self.encoder.count_flops(source) + self.decoder.count_flops(target, context=source)
        return stacks + 2 * target * self.head.weight.numel()
