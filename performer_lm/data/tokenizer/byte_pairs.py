"""Byte-pair encoding: a token is a merge of frequent neighbours."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final, final

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from performer_lm.data.tokenizer.byte_level import (
    BYTE_VALUES,
    LONGEST_WORD,
    ByteLevelTokenizer,
    read_split,
    spell,
    split_at,
    training_parts,
)
from performer_lm.wording import short

SPLIT: Final = "words"  # where trained tokenizers part words
MOST_BYTES: Final = 1 << 28  # of the pieces that merges make


@final
class BytePairTokenizer(ByteLevelTokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909).

    Ids 0..255 are the bytes themselves; each further id is the first pair in `merges` that makes its bytes. `merges`
    are pairs of ids, strongest first; each may use the bytes and the results of earlier pairs.
    """

    def __init__(self, *, merges: Sequence[Sequence[int]], split: str, specials: Sequence[str] = ()) -> None:
        pieces = _merged_pieces(merges)
        self._merges = [[left, right] for left, right in merges]
        names = [spell(piece) for piece in pieces]
        pairs = [(names[left], names[right]) for left, right in merges]
        model = models.BPE({name: token for token, name in enumerate(names)}, pairs)
        super().__init__(pieces, model=model, split=split, specials=specials)

    def _plain(self) -> dict[str, Any]:
        return {"kind": "byte_pairs", "split": self._split, "merges": [list(pair) for pair in self._merges]}


def train_byte_pairs(texts: Iterable[bytes], *, vocab_size: int, specials: Sequence[str] = ()) -> BytePairTokenizer:
    """Train byte-pair encoding on documents; the same texts give the same tokenizer, on any number of threads.

    `vocab_size` counts the 256 bytes, the end and the special tokens. Little text may not fill it.
    """
    tokens = dict(BYTE_VALUES)
    merges = []
    size = max(vocab_size - 1 - len(specials), 256)
    for left, right in learn_merges(texts, vocab_size=size, pre_tokenizer=split_at(SPLIT)):
        merges.append([tokens[left], tokens[right]])
        tokens.setdefault(left + right, len(tokens))
    return BytePairTokenizer(merges=merges, split=SPLIT, specials=specials)


def learn_merges(
    texts: Iterable[bytes], *, vocab_size: int, pre_tokenizer: pre_tokenizers.PreTokenizer, extra: Sequence[str] = ()
) -> list[list[str]]:
    """Return the library's merges of spelled pieces, strongest first; its trainer gives the same ones every time.

    Args:
        texts: documents.
        vocab_size: pieces in all, with the alphabet.
        pre_tokenizer: parts words, and spells them.
        extra: characters of the alphabet beside those of bytes.
    """
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *extra]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(training_parts(texts), trainer)
    merges: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    return merges


def read_byte_pairs(plain: dict[str, Any], *, specials: Sequence[str]) -> BytePairTokenizer:
    """Build the tokenizer that plain data describes, or raise ValueError in one line."""
    split, merges = read_split(plain), plain.get("merges")
    if not isinstance(merges, list):
        raise ValueError(f"tokenizer data: merges ({short(merges)}) must be a list of pairs of ids")
    for index, pair in enumerate(merges):
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(token) is int for token in pair)):
            raise ValueError(f"tokenizer data: merge {index} ({short(pair)}) must be a pair of ids")
    return BytePairTokenizer(merges=merges, split=split, specials=specials)


def _merged_pieces(merges: Sequence[Sequence[int]]) -> list[bytes]:
    """Return the bytes of each id; two merges that make the same bytes make one id."""
    pieces = [bytes([value]) for value in range(256)]
    known = set(pieces)
    total = 0
    for index, pair in enumerate(merges):
        if not all(0 <= token < len(pieces) for token in pair):
            raise ValueError(f"tokenizer data: merge {index} ({short(pair)}) must use ids in 0..{len(pieces) - 1}")
        if (piece := pieces[pair[0]] + pieces[pair[1]]) not in known:
            total += len(piece)
            if len(piece) > LONGEST_WORD or total > MOST_BYTES:  # each merge may double what an earlier one made
                raise ValueError(
                    f"tokenizer data: merge {index} ({short(pair)}) makes a piece of {len(piece):,} bytes, {total:,} "
                    f"in all; at most {LONGEST_WORD:,} and {MOST_BYTES:,} are read"
                )
            known.add(piece)
            pieces.append(piece)
    return pieces
