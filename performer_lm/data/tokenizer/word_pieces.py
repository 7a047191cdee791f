"""WordPiece: a word is written with the longest pieces that fit, from its start on."""

from collections.abc import Iterable, Sequence
from typing import Any, Final, final

from tokenizers import models, pre_tokenizers

from performer_lm.data.tokenizer.byte_level import (
    LONGEST_WORD,
    ByteLevelTokenizer,
    read_piece,
    read_split,
    spell,
    split_at,
)
from performer_lm.data.tokenizer.byte_pairs import SPLIT, learn_merges
from performer_lm.wording import short

INSIDE: Final = "\u2581"  # before a piece that continues a word; spells no byte
BASE: Final = 512  # pieces of one byte: at the start of a word and inside it


@final
class WordPieceTokenizer(ByteLevelTokenizer):
    """WordPiece over bytes (Schuster and Nakajima 2012; Devlin et al. 2018, arXiv:1810.04805).

    Ids 0..255 are the bytes at the start of a word, 256..511 the bytes inside one; `pieces` are the further ones as the
    library spells them, with `INSIDE` before those that continue a word.
    """

    def __init__(self, *, pieces: Sequence[str], split: str, specials: Sequence[str] = ()) -> None:
        first = [spell(bytes([value])) for value in range(256)]
        spelled = [*first, *(INSIDE + name for name in first), *pieces]
        table = [read_piece(name, mark=INSIDE) for name in spelled]
        vocabulary = {name: token for token, name in enumerate(spelled)}
        if len(vocabulary) < len(spelled):
            raise ValueError("tokenizer data: pieces must differ from each other and from the single bytes")
        self._spelled = list(pieces)
        model = models.WordPiece(
            vocabulary,
            unk_token="",  # never needed: single bytes write anything
            continuing_subword_prefix=INSIDE,
            max_input_chars_per_word=LONGEST_WORD,
        )
        super().__init__(table, model=model, split=split, specials=specials)

    def _plain(self) -> dict[str, Any]:
        return {"kind": "word_pieces", "split": self._split, "pieces": list(self._spelled)}


def train_word_pieces(texts: Iterable[bytes], *, vocab_size: int, specials: Sequence[str] = ()) -> WordPieceTokenizer:
    """Train WordPiece on documents; the same texts give the same tokenizer, every time.

    The library's own WordPiece trainer numbers its alphabet in an order that changes from process to process. Its
    byte-pair trainer does not, so that one is run on words with a mark before them: what merges with the mark begins a
    word. `vocab_size` counts 2 x 256 bytes, the end and the special tokens. Little text may not fill it.
    """
    most = max(vocab_size - BASE - 1 - len(specials), 0)
    marked = pre_tokenizers.Sequence(
        [split_at(SPLIT), pre_tokenizers.Metaspace(replacement=INSIDE, prepend_scheme="always", split=False)]
    )
    merges = learn_merges(texts, vocab_size=257 + 256 + most, pre_tokenizer=marked, extra=[INSIDE])
    merged = dict.fromkeys(left + right for left, right in merges)
    pieces = [name.removeprefix(INSIDE) if name.startswith(INSIDE) else INSIDE + name for name in merged]
    longer = [name for name in pieces if len(name.removeprefix(INSIDE)) > 1]
    return WordPieceTokenizer(pieces=longer[:most], split=SPLIT, specials=specials)


def read_word_pieces(plain: dict[str, Any], *, specials: Sequence[str]) -> WordPieceTokenizer:
    """Build the tokenizer that plain data describes, or raise ValueError in one line."""
    split, pieces = read_split(plain), plain.get("pieces")
    if not isinstance(pieces, list) or not all(isinstance(name, str) for name in pieces):
        raise ValueError(f"tokenizer data: pieces ({short(pieces)}) must be a list of spelled pieces")
    return WordPieceTokenizer(pieces=pieces, split=split, specials=specials)
