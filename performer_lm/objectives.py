"""What a model learns from windows of text: which positions it predicts, and the loss of each.

Training divides the summed losses by a constant, the objective's usual number of predictions, so that micro-batches and
ranks that happen to predict fewer tokens weigh no more; validation divides by what was predicted.
Letters: `b` batch, `n` tokens.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Final, NamedTuple, final

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.data.windows import IGNORE, segments_of
from performer_lm.encoder_decoder import PerformerEncoderDecoder
from performer_lm.language_model import LanguageModel
from performer_lm.model import PerformerLM
from performer_lm.ops.cross_entropy import linear_cross_entropy
from performer_lm.ops.hashing import mix
from performer_lm.ops.precision import sum_dtype
from performer_lm.ranges import Count, Fraction, ranged

WHOLE: Final = 2**26  # logits of a micro-batch that are held at once: 256 MiB of float32
PIECE: Final = 2**25  # logits of a chunk, where there are more


class Losses(NamedTuple):
    """The losses of one micro-batch."""

    nats: Tensor
    """`(b, n)` float32 or wider, zero where nothing was predicted."""
    targets: Tensor
    """`(b, n)` the ids that were predicted, `IGNORE` elsewhere."""


class Prediction(NamedTuple):
    """The hidden vectors and targets of one micro-batch."""

    hidden: Tensor
    """`(b, n, dim)`, the input of the output layer."""
    targets: Tensor
    """`(b, n)` the ids that are to be predicted from it, `IGNORE` elsewhere."""


@ranged
class Objective(ABC):
    """A way to make losses from windows; `share` of the positions are predicted, on average.

    `predicted` is what one prediction is called.

    Args:
        chunk_size: tokens whose logits are held at once; None for all while they need at most 256 MiB, else for as
            many as need half of that.
    """

    share: float = 1.0
    predicted: str = "token"

    def __init__(self, *, chunk_size: Count | None) -> None:
        self.chunk_size = chunk_size

    @abstractmethod
    def check(self, model: LanguageModel, *, packed: bool, answers: bool) -> None:
        """Raise ValueError for a model or data that this objective cannot train, naming those it can.

        Args:
            model: that is to learn.
            packed: whether windows hold documents that do not see one another.
            answers: whether only some ids of a window count (`windows.seen`).
        """

    def adopt(self, tokenizer: Tokenizer) -> None:
        """Take ids from the tokenizer; to be called before the first use."""
        del tokenizer

    def sources(self) -> dict[str, str]:
        """Return digests, by name, of other files that are learned from: a run goes on only with the same."""
        return {}

    def join(self, model: LanguageModel) -> None:
        """Choose what of a model learns; to be called after `adopt`, before its optimizer is made.

        Raises:
            ValueError: for a model that cannot learn so.
        """
        del model

    @abstractmethod
    def ask(self, model: Any, windows: Tensor, *, step: int | None, separator: int | None = None) -> Prediction:
        """Show a model windows `(b, n + 1)`, filled up with `IGNORE`.

        Whatever is random must be a function of the seed, the step and the windows alone, so that resumes, ranks and
        accumulation change nothing.

        Args:
            model: the model that predicts.
            windows: ids of one micro-batch.
            step: the optimizer step in training, from 0; None in validation, which predicts the same every time.
            separator: the id that begins a document where tokens see their own document only; None: they see all.
        """

    def __call__(self, model: Any, windows: Tensor, *, step: int | None, separator: int | None = None) -> Losses:
        """Return the losses of a micro-batch."""
        hidden, targets = self.ask(model, windows, step=step, separator=separator)
        return Losses(token_losses(model.head, hidden, targets, chunk_size=self.chunk_size), targets)

    def mean(self, losses: Losses) -> Tensor:
        """Return the loss that training minimises: nats per usually predicted position."""
        return losses.nats.sum() / (self.share * losses.nats.numel())


@final
class NextToken(Objective):
    """Predict each next token (causal language modelling)."""

    def check(self, model: LanguageModel, *, packed: bool, answers: bool) -> None:
        """Want a causal model without a context."""
        if not (isinstance(model, PerformerLM) and model.decodes):
            fitting = "mlm" if isinstance(model, PerformerLM) else "seq2seq"
            raise ValueError(
                f"objective=clm predicts each next token, with a causal model of one stack; for this one set "
                f"objective={fitting}"
            )

    def ask(self, model: PerformerLM, windows: Tensor, *, step: int | None, separator: int | None = None) -> Prediction:
        """Ask for every token but the windows' first."""
        inputs, targets = shift(windows)
        segments = None if separator is None else segments_of(inputs, separator)
        return Prediction(model.hidden(inputs, segments=segments), targets)


@ranged
@final
class MaskedTokens(Objective):
    """Predict tokens that the model does not see, from both sides (BERT, arXiv 1810.04805).

    Which tokens are chosen is a hash of the seed, the step, the window and the place.

    Args:
        masked: share of the tokens that are chosen for prediction.
        hidden: share of the chosen that become the mask token.
        replaced: share of the chosen that become a token at random; the rest stay as they are.
        seed: of the choice.
        chunk_size: of `Objective`.

    Raises:
        ValueError: for shares outside their range.
    """

    predicted = "masked token"
    mask_id: int
    words: int

    def __init__(
        self,
        *,
        masked: Annotated[float, Gt(0), Le(1)],
        hidden: Fraction,
        replaced: Fraction,
        seed: int,
        chunk_size: Count | None,
    ) -> None:
        super().__init__(chunk_size=chunk_size)
        if hidden + replaced > 1:
            raise ValueError(
                f"objective.hidden and objective.replaced are shares of the masked tokens that sum to at most 1; "
                f"got {hidden} and {replaced}"
            )
        self.share = masked
        self.bounds = (masked, masked * hidden, masked * (hidden + replaced))
        self.seed = seed

    def check(self, model: LanguageModel, *, packed: bool, answers: bool) -> None:
        """Want a bidirectional model without a context, and text."""
        if not isinstance(model, PerformerLM) or model.performer.causal or model.performer.cross_attend:
            raise ValueError("objective=mlm needs a model that sees both sides: model=performer_encoder")
        if answers:
            raise ValueError("objective=mlm learns from text; data=synthetic asks for answers: objective=clm")

    def adopt(self, tokenizer: Tokenizer) -> None:
        """Take the id of the special token `mask`, and the number of ids that are text.

        Raises:
            ValueError: for a tokenizer without a mask token.
        """
        self.mask_id, self.words = tokenizer.special_id("mask"), tokenizer.num_pieces

    def ask(self, model: PerformerLM, windows: Tensor, *, step: int | None, separator: int | None = None) -> Prediction:
        """Ask for the chosen among the windows' first n tokens."""
        ids = windows[:, :-1]
        given = ids != IGNORE
        masked, hidden, replaced = (round(bound * 2**32) for bound in self.bounds)
        bits, other = self._draw(ids, step)
        shown = torch.where(bits < replaced, other % self.words, ids)
        shown = torch.where(bits < hidden, self.mask_id, shown).where(given, 0)
        segments = None if separator is None else segments_of(ids, separator)
        found = model.hidden(shown, mask=given, segments=segments)
        return Prediction(found, torch.where(bits < masked, ids, IGNORE))

    def _draw(self, ids: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        """Return two random numbers of 32 bits for each token, `(b, n)`."""
        place = mix(torch.arange(ids.shape[1], device=ids.device) ^ 0xBB67AE85)
        window = mix((mix(ids ^ place).sum(1, keepdim=True) ^ mix(self.seed ^ 0x6A09E667)) & 0xFFFFFFFF)
        moment = 0x3C6EF372 if step is None else mix(step ^ 0xA54FF53A)
        bits = mix(mix(window ^ moment) ^ place)
        return bits, mix(bits ^ 0x510E527F)


@final
class SourceToTarget(Objective):
    """Write the second half of each window from its first (sequence to sequence)."""

    predicted = "target token"

    def check(self, model: LanguageModel, *, packed: bool, answers: bool) -> None:
        """Want an encoder-decoder, and text whose documents stand in one stream."""
        if not isinstance(model, PerformerEncoderDecoder):
            raise ValueError("objective=seq2seq needs an encoder and a decoder: model=performer_seq2seq")
        if answers:
            raise ValueError("objective=seq2seq learns from text; data=synthetic asks for answers: objective=clm")
        if packed:
            raise ValueError("objective=seq2seq takes no packed documents: set data.documents to stream or cropped")

    def ask(
        self, model: PerformerEncoderDecoder, windows: Tensor, *, step: int | None, separator: int | None = None
    ) -> Prediction:
        """Ask for every token of the second half."""
        source, targets = windows.tensor_split(2, dim=1)
        begin = targets.new_full((len(targets), 1), model.start_id)
        inputs = torch.cat((begin, targets[:, :-1]), dim=1).clamp(min=0)
        return Prediction(model.hidden(source.clamp(min=0), inputs, source_mask=source != IGNORE), targets)


def shift(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Split windows `(b, n + 1)` into inputs and targets `(b, n)` of next-token prediction.

    Targets are `IGNORE` where there is fill or what is only `shown`. Inputs get 0 for fill, which no causal prediction
    that counts can see: it comes last.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    return torch.where(inputs < IGNORE, IGNORE - 1 - inputs, inputs).clamp(min=0), targets.clamp(min=IGNORE)


def token_losses(head: nn.Linear, hidden: Tensor, targets: Tensor, *, chunk_size: int | None) -> Tensor:
    """Return the loss `(b, n)` in nats of an output layer that reads `hidden` `(b, n, dim)`; zero at `IGNORE`.

    Args:
        head: the output layer.
        hidden: what it reads.
        targets: `(b, n)` ids to predict.
        chunk_size: of `Objective`.
    """
    chunk_size = chunk_size or choose_chunk_size(targets.numel(), vocab_size=head.out_features)
    if chunk_size < targets.numel():
        return linear_cross_entropy(
            hidden, head.weight, targets, chunk_size=chunk_size, bias=head.bias, ignore_index=IGNORE
        )
    logits = head(hidden).flatten(0, 1)
    logits = logits.to(sum_dtype(logits))
    losses = F.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORE, reduction="none")
    return losses.reshape(targets.shape)


def kl_divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return the divergence `(...)` in nats of logits `(..., vocab)` from those that are wanted."""
    told = wanted.log_softmax(-1)
    return (told.exp() * (told - logits.log_softmax(-1))).sum(-1)


def choose_chunk_size(tokens: int, *, vocab_size: int) -> int:
    """Return how many tokens' logits to hold at once: all of them, or a chunk where they would be many."""
    return tokens if tokens * vocab_size <= WHOLE else max(1, PIECE // vocab_size)
