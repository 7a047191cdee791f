"""What a model learns from windows of text: which positions it predicts, and the loss of each.

Training divides the summed losses by a constant, the objective's usual number of predictions, so that micro-batches and
ranks that happen to predict fewer tokens weigh no more; validation divides by what was predicted.
Letters: `b` batch, `n` tokens.
"""

from abc import ABC, abstractmethod
from typing import Final, NamedTuple, final

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from performer_lm.data.windows import IGNORE, segments_of, shift
from performer_lm.model import PerformerLM
from performer_lm.ops.cross_entropy import linear_cross_entropy
from performer_lm.ops.softmax import sum_dtype

WHOLE: Final = 2**26  # logits of a micro-batch that are held at once: 256 MiB of float32
PIECE: Final = 2**25  # logits of a chunk, where there are more


class Losses(NamedTuple):
    """The losses of one micro-batch."""

    nats: Tensor
    """`(b, n)` float32 or wider, zero where nothing was predicted."""
    targets: Tensor
    """`(b, n)` the ids that were predicted, `IGNORE` elsewhere."""


class Objective(ABC):
    """A way to make losses from windows; `share` of the positions are predicted, on average."""

    share: float = 1.0

    @abstractmethod
    def __call__(
        self, model: PerformerLM, windows: Tensor, *, step: int | None, separator: int | None = None
    ) -> Losses:
        """Return the losses of windows `(b, n + 1)`, in which `IGNORE` fills up what is no text.

        Whatever is random must be a function of the seed, the step and the windows alone, so that resumes, ranks and
        accumulation change nothing.

        Args:
            model: the model that predicts.
            windows: ids of one micro-batch.
            step: the optimizer step in training, from 0; None in validation, which predicts the same every time.
            separator: the id that begins a document where tokens see their own document only; None: they see all.
        """

    def mean(self, losses: Losses) -> Tensor:
        """Return what training minimises: nats per usually predicted position."""
        return losses.nats.sum() / (self.share * losses.nats.numel())


@final
class NextToken(Objective):
    """Predict each next token.

    Args:
        chunk_size: tokens whose logits are held at once; None for all while they need at most 256 MiB, else for as
            many as need half of that.
    """

    def __init__(self, *, chunk_size: int | None) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"objective.chunk_size must be at least 1, got {chunk_size}")
        self.chunk_size = chunk_size

    def __call__(
        self, model: PerformerLM, windows: Tensor, *, step: int | None, separator: int | None = None
    ) -> Losses:
        """Return the loss of every token but the windows' first."""
        del step
        inputs, targets = shift(windows)
        segments = None if separator is None else segments_of(inputs, separator)
        return Losses(token_losses(model, inputs, targets, segments=segments, chunk_size=self.chunk_size), targets)


def token_losses(
    model: PerformerLM, tokens: Tensor, targets: Tensor, *, segments: Tensor | None, chunk_size: int | None
) -> Tensor:
    """Return the loss `(b, n)` in nats that `model`, reading `tokens` `(b, n)`, has at `targets`; zero at `IGNORE`.

    Args:
        model: the model.
        tokens: ids.
        targets: ids to predict at the places of `tokens`.
        segments: `(b, n)` numbers of documents that do not see one another.
        chunk_size: of `NextToken`.
    """
    chunk_size = chunk_size or choose_chunk_size(targets.numel(), vocab_size=model.head.out_features)
    if chunk_size < targets.numel():
        hidden, head = model.hidden(tokens, segments=segments), model.head
        return linear_cross_entropy(
            hidden, head.weight, targets, chunk_size=chunk_size, bias=head.bias, ignore_index=IGNORE
        )
    logits = rearrange(model(tokens, segments=segments), "b n vocab -> (b n) vocab")
    logits = logits.to(sum_dtype(logits))
    losses = F.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORE, reduction="none")
    return losses.reshape(targets.shape)


def choose_chunk_size(tokens: int, *, vocab_size: int) -> int:
    """Return how many tokens' logits to hold at once: all of them, or a chunk where they would be many."""
    return tokens if tokens * vocab_size <= WHOLE else max(1, PIECE // vocab_size)
