"""Text to ids and back, byte by byte: every id stands for some bytes of text.

A tokenizer is its table of pieces, `pieces[id] -> bytes`, so bits per byte can be counted from ids alone. After the
pieces comes the end of a document, unless it is one of them, then special tokens by name; neither stands for bytes, and
no text spells them.
Tokenizers are saved as plain data (`to_dict`), which a checkpoint holds and `tokenizer_from_dict` checks before it
builds anything.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from performer_lm.wording import did_you_mean, short

Ids = NDArray[np.int64]
Text = str | bytes

MOST_IDS: Final = 1 << 22


class Tokenizer(ABC):
    """A table of byte pieces and a way to write text with them.

    Args:
        pieces: the bytes that each id stands for.
        specials: names of special tokens, whose ids follow all others.
        end_ids: of the pieces, those that end a text; the first ends documents. Without them, the end is an id of its
            own, after the pieces'.
        begin_id: of the pieces, the one that stands before a text to be continued; None for none.
    """

    chat_template: str | None = None
    """The Jinja template that writes `messages` as a text, for `encode_marked`; None where a model knows no turns."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        specials: Sequence[str] = (),
        end_ids: Sequence[int] = (),
        begin_id: int | None = None,
    ) -> None:
        _check_specials(specials)
        self.num_pieces: Final[int] = len(pieces)
        self.end_ids: Final[tuple[int, ...]] = tuple(end_ids) or (len(pieces),)
        self.end_id: Final[int] = self.end_ids[0]
        self.begin_id: Final[int | None] = begin_id
        first = len(pieces) + (not end_ids)
        self._pieces = [*pieces, *(b"" for _ in range(first - len(pieces))), *(b"" for _ in specials)]
        self.specials: Final[dict[str, int]] = {name: first + place for place, name in enumerate(specials)}
        self.vocab_size: Final[int] = len(self._pieces)

    @abstractmethod
    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        """Return the ids of each text; never `end_id`, never a special token's.

        Raises:
            ValueError: for a string that cannot be written as UTF-8, and, where the tokenizer cannot take them, for
                bytes that are not UTF-8.
        """

    @abstractmethod
    def _plain(self) -> dict[str, Any]:
        """Return the kind, and the data that rebuild the pieces."""

    @final
    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `tokenizer_from_dict` builds an equal tokenizer."""
        options = {"specials": list(self.specials), "chat_template": self.chat_template}
        return self._plain() | {name: value for name, value in options.items() if value}

    def encode(self, text: Text) -> Ids:
        """Return the ids `(n,)` of a text; `decode_bytes` gives back its bytes exactly."""
        return self.encode_batch([text])[0]

    def encode_marked(self, text: str) -> Ids:
        """Return the ids of a text that may spell the tokenizer's own special tokens, as a chat template does."""
        return self.encode(text)

    def begin(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a text to be continued as a model is given them: never none, after `begin_id` if any."""
        if self.begin_id is not None:
            return [self.begin_id, *ids]
        return list(ids) or [self.end_id]

    def special_id(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            ValueError: if the tokenizer has none of that name.
        """
        if name not in self.specials:
            hint = did_you_mean(name, self.specials, cutoff=0.6) or f"; tokenizer.specials=[{name}] adds it"
            raise ValueError(f"the tokenizer has no special token '{name}'{hint}")
        return self.specials[name]

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of text that one id stands for."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id ({token}) must lie in 0..{self.vocab_size - 1}")
        return self._pieces[token]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that ids `(n,)` stand for."""
        return b"".join(self.token_bytes(int(token)) for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that ids `(n,)` stand for; broken UTF-8 becomes the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> Ids:
        """Return how many bytes of text each id stands for, `(vocab,)`."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    def equal_lengths(self, each: float) -> NDArray[np.float32]:
        """Return `each` for the ids of text, and 0 for the ends and special tokens, `(vocab,)`."""
        lengths = np.full(self.vocab_size, each, dtype=np.float32)
        lengths[[*self.end_ids, *self.specials.values()]] = 0
        return lengths


@final
class TextStream:
    """Ids turned into text as they come; a character is given out once its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """Return the replacement character for an unfinished character, if there is one."""
        return self._decoder.decode(b"", final=True)


def _check_specials(names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or name == "end":
            raise ValueError(f"tokenizer.specials: {short(name)} must be a name such as mask, and not end")
    if len(set(names)) != len(names):
        raise ValueError(f"tokenizer.specials ({', '.join(names)}) must differ from each other")
