"""Rows of tokens as text: where each ends, how likely it is, and the loop that writes them."""

import codecs
import time
from collections.abc import Iterator, Sequence
from typing import Final, Literal

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.data.tokenizer.utf8 import as_bytes
from performer_lm.generation.decode import Drawn, Prefix, draw_tokens
from performer_lm.generation.sampling import Generators, Sampler
from performer_lm.language_model import LanguageModel


class Row:
    """The continuation of a prompt as its tokens come: text up to the first stop string, tokens, log-probabilities.

    Args:
        tokenizer: whose tokens come; any of its `end_ids` ends the row.
        stop: strings that end the text, which leaves them out; each may span tokens.

    Raises:
        ValueError: for an empty stop string, or one that cannot be written as UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise ValueError("stop must not be empty: an empty string stands before every text")
        self.text = ""
        self.tokens: Final[list[int]] = []
        self.log_probs: Final[list[float]] = []
        self.ending: Literal["end", "stop", "length"] | None = None
        self.seconds = 0.0  # from here to the end
        self._started = time.perf_counter()
        self._tokenizer = tokenizer
        self._stop = [as_bytes(text) for text in stop]
        self._held = b""  # may be the start of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int, log_prob: float) -> str:
        """Take a token; return the text that no later token can take back. A row that has ended takes none."""
        if self.ending is not None:
            return ""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        self._held += self._tokenizer.token_bytes(token)
        found = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)[1]]  # of the one complete first, however the text is cut into tokens
            return self.close("stop")
        if token in self._tokenizer.end_ids:
            return self.close("end")
        return self._give(len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0))

    def close(self, ending: Literal["end", "stop", "length"] = "length") -> str:
        """End the row, unless it has ended; return the text that was held back."""
        if self.ending is not None:
            return ""
        self.ending, self.seconds = ending, time.perf_counter() - self._started
        return self._give(len(self._held))

    @property
    def likelihood(self) -> float:
        """Return the mean log-probability of the tokens."""
        return sum(self.log_probs) / max(1, len(self.log_probs))

    def _give(self, count: int) -> str:
        piece = self._decoder.decode(self._held[:count], final=self.ending is not None)
        self._held = self._held[count:]
        self.text += piece
        return piece


def _overlap(text: bytes, stop: bytes) -> int:
    """Return the length of the longest end of a text that is the start of a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prefix: Prefix,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    generator: Generators | None = None,
) -> Iterator[tuple[Drawn, list[str]]]:
    """Draw tokens until every row has ended: yield each draw, and the text that it settles in each row.

    The arguments are those of `draw_tokens`, and `rows`, which take the tokens of the prefix's rows.
    """
    draws = draw_tokens(
        model,
        prefix,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        end_id=tokenizer.end_id,
        generator=generator,
    )
    for count, drawn in enumerate(draws, 1):
        tokens = zip(rows, drawn.ids.tolist(), drawn.log_probs.tolist(), strict=True)
        pieces = [row.push(token, log_prob) for row, token, log_prob in tokens]
        if count == max_new_tokens:
            pieces = [piece + row.close() for piece, row in zip(pieces, rows, strict=True)]
        yield drawn, pieces
        if all(row.ending for row in rows):
            return
