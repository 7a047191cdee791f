"""One text that is read and written by turns, each token read once."""

from collections.abc import Generator, Iterator, Sequence

import torch

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.generation.decode import Prefix, check_one_row, check_room, read
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.text import Row, write
from performer_lm.language_model import LanguageModel
from performer_lm.ranges import Count, ranged


@ranged
class Session:
    """A text that a model reads and continues, turn after turn, with the state of the last.

    Args:
        model: which keeps its training or evaluation mode.
        tokenizer: the model's.
        max_new_tokens: how many a turn adds at most.
        sampler: how a token is chosen.
        seed: of the draws of all turns together.
        stop: strings that end a turn, see `Row`.

    Raises:
        ValueError: for a model that does not decode, ids that are not the tokenizer's, or an empty stop string.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: Count,
        sampler: Sampler,
        seed: int,
        stop: Sequence[str] = (),
    ) -> None:
        check_room(model, 0, 0)
        sampler.check(tokenizer.vocab_size)
        Row(tokenizer, stop=stop)
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sampler, self.stop = max_new_tokens, sampler, stop
        self.prefix: Prefix | None = None
        self._unread: list[int] = []  # the last token drawn
        self._device = model.head.weight.device
        self._generator = torch.Generator(self._device).manual_seed(seed)

    def read(self, text: str = "") -> Prefix:
        """Read more text, after the last turn's; an empty one begins a document where nothing was read.

        Raises:
            ValueError: for text that the tokenizer cannot write, and where learned positions end.
        """
        ids = [*self._unread, *self.tokenizer.encode(text).tolist()]
        if self.prefix is None:
            ids = self.tokenizer.begin(ids)
        tokens = torch.tensor([ids], device=self._device, dtype=torch.int64)
        self.prefix = read(self.model, tokens, after=self.prefix, max_new_tokens=self.max_new_tokens)
        self._unread = []
        return self.prefix

    def write(self) -> Generator[str, None, None]:
        """Yield the continuation of what was read, piece by piece; a turn may be broken off between two pieces."""
        prefix = self.read() if self.prefix is None else self.prefix
        row = Row(self.tokenizer, stop=self.stop)
        drawn = None
        try:
            for turn in write(
                self.model,
                self.tokenizer,
                prefix,
                [row],
                max_new_tokens=self.max_new_tokens,
                sampler=self.sampler,
                generator=self._generator,
            ):
                drawn, (piece,) = turn
                yield piece
        finally:
            if drawn is not None:
                made = prefix.tokens.new_tensor([row.tokens[:-1]])
                tokens, mask = torch.cat((prefix.tokens, made), 1), torch.cat((prefix.mask, made >= 0), 1)
                self.prefix, self._unread = Prefix(tokens, mask, drawn.logits, drawn.state), row.tokens[-1:]

    @property
    def text(self) -> str:
        """Return the text so far, read and written."""
        ids = [] if self.prefix is None else self.prefix.tokens[self.prefix.mask].tolist()
        return self.tokenizer.decode([*ids, *self._unread])

    def resume(self, prefix: Prefix | None) -> None:
        """Go on after another text, or with None begin anew.

        Raises:
            ValueError: for several rows.
        """
        if prefix is not None:
            check_one_row(prefix)
        self.prefix, self._unread = prefix, []


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    seed: int,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece as it is made; it stops where the model ends the document.

    An empty prompt begins a new document. The arguments are those of `Session`.

    Raises:
        ValueError: at once, for a prompt that cannot be written as UTF-8, and as `Session` does.
    """
    session = Session(model, tokenizer, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed, stop=stop)
    session.read(prompt)
    return session.write()
