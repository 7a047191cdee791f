"""Unigram: a word is written with the pieces that are likeliest together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, final

import numpy as np
import tokenizers
from tokenizers import models, trainers

from performer_lm.data.tokenizer.byte_level import (
    BYTE_NAMES,
    ByteLevelTokenizer,
    read_piece,
    read_split,
    split_at,
    training_parts,
)
from performer_lm.data.tokenizer.byte_pairs import SPLIT, learn_merges
from performer_lm.wording import short

SEEDS: Final = 4  # pieces to begin with, for each that is wanted
KEEP: Final = 0.75  # share of the pieces that a round of pruning leaves
DIGITS: Final = 6  # of a log probability
WORDS_AT_ONCE: Final = 1 << 14
PARTS_AT_ONCE: Final = 16


@final
class UnigramTokenizer(ByteLevelTokenizer):
    """The unigram language model over bytes (Kudo 2018, arXiv:1804.10959). Ids 0..255 are the bytes.

    `pieces` are all pieces as the library spells them, the bytes first, and their log probabilities.
    """

    def __init__(self, *, pieces: Sequence[tuple[str, float]], split: str, specials: Sequence[str] = ()) -> None:
        self._scored = list(pieces)
        spelled = [name for name, _ in pieces]
        if spelled[:256] != BYTE_NAMES or len(set(spelled)) < len(spelled):
            raise ValueError("tokenizer data: pieces must begin with the 256 bytes and differ from each other")
        table = [read_piece(name) for name in spelled]
        super().__init__(table, model=models.Unigram(self._scored, None, False), split=split, specials=specials)

    def _plain(self) -> dict[str, Any]:
        return {"kind": "unigram", "split": self._split, "pieces": [list(pair) for pair in self._scored]}


def train_unigram(texts: Iterable[bytes], *, vocab_size: int, specials: Sequence[str] = ()) -> UnigramTokenizer:
    """Train a unigram model on documents, gone through twice; the same texts give the same tokenizer, every time.

    Seeds are byte pairs. In turns, words are written with the likeliest pieces, each piece gets the log of its share,
    and the pieces go whose loss costs least, until `vocab_size` are left, with the 256 bytes, the end and the special
    tokens. Counts are whole numbers, so nothing depends on the order of sums; the library's own trainer adds floating-
    point numbers from several threads, and no two runs of it agree.
    """
    texts = list(texts) if iter(texts) is texts else texts
    wanted = max(vocab_size - 1 - len(specials), 256)
    merges = learn_merges(texts, vocab_size=256 + SEEDS * (wanted - 256), pre_tokenizer=split_at(SPLIT))
    seeds = dict.fromkeys([*BYTE_NAMES, *(left + right for left, right in merges)])
    words = _count_words(texts)
    scores = _estimate(dict.fromkeys(seeds, -1.0), words)  # the fewest pieces
    while True:
        scores = _estimate(_estimate(scores, words), words)
        if len(scores) <= wanted:
            break
        scores = _prune(scores, keep=max(wanted, int(KEEP * len(scores))))
    longer = sorted((name for name in scores if len(name) > 1), key=lambda name: (-scores[name], name))
    pieces = [(name, scores[name]) for name in (*BYTE_NAMES, *longer)]
    return UnigramTokenizer(pieces=pieces, split=SPLIT, specials=specials)


def read_unigram(plain: dict[str, Any], *, specials: Sequence[str]) -> UnigramTokenizer:
    """Build the tokenizer that plain data describes, or raise ValueError in one line."""
    split, pieces = read_split(plain), plain.get("pieces")
    if not isinstance(pieces, list):
        raise ValueError(f"tokenizer data: pieces ({short(pieces)}) must be a list of pieces and log probabilities")
    for index, pair in enumerate(pieces):
        right = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is float
        if not right or not math.isfinite(pair[1]):
            raise ValueError(f"tokenizer data: piece {index} ({short(pair)}) must be a string and a finite number")
    return UnigramTokenizer(pieces=[(name, score) for name, score in pieces], split=split, specials=specials)


def _count_words(texts: Iterable[bytes]) -> dict[str, int]:
    """Return how often each word occurs, by its own characters."""
    library = tokenizers.Tokenizer(models.WordLevel({}, unk_token=""))
    library.pre_tokenizer = split_at(SPLIT)
    trainer = trainers.WordLevelTrainer(vocab_size=1 << 40, show_progress=False)
    library.train_from_iterator(training_parts(texts), trainer)
    names = sorted(library.get_vocab().items(), key=lambda item: item[1])
    counts = np.zeros(len(names), dtype=np.int64)
    parts = training_parts(texts)
    while group := list(islice(parts, PARTS_AT_ONCE)):
        for encoding in library.encode_batch_fast(group):
            counts += np.bincount(encoding.ids, minlength=len(names))
    return {name: int(times) for (name, _), times in zip(names, counts, strict=True)}


def _estimate(scores: Mapping[str, float], words: Mapping[str, int]) -> dict[str, float]:
    """Write all words with the likeliest pieces, and return the log share of each piece in the result."""
    library = tokenizers.Tokenizer(models.Unigram(list(scores.items()), None, False))
    counts = np.zeros(len(scores), dtype=np.int64)
    spelled, times = list(words), np.array(list(words.values()), dtype=np.int64)
    for first in range(0, len(spelled), WORDS_AT_ONCE):
        encodings = [encoding.ids for encoding in library.encode_batch_fast(spelled[first : first + WORDS_AT_ONCE])]
        weights = np.repeat(times[first : first + WORDS_AT_ONCE], [len(ids) for ids in encodings])
        np.add.at(counts, np.array([token for ids in encodings for token in ids], dtype=np.int64), weights)
    total = int(counts.sum()) + len(counts)
    return {name: round(math.log((int(found) + 1) / total), DIGITS) for name, found in zip(scores, counts, strict=True)}


def _prune(scores: Mapping[str, float], *, keep: int) -> dict[str, float]:
    """Keep the bytes, and the longer pieces whose loss would cost most nats: their share times the difference."""
    costs = {
        name: math.exp(score) * (score - _without(name, scores)) for name, score in scores.items() if len(name) > 1
    }
    dearest = sorted(costs, key=lambda name: (-costs[name], name))[: keep - 256]
    kept = {*BYTE_NAMES, *dearest}
    return {name: score for name, score in scores.items() if name in kept}


def _without(name: str, scores: Mapping[str, float]) -> float:
    """Return the log probability of the likeliest way to write a piece with shorter ones."""
    best = [0.0] + [-math.inf] * len(name)
    for end in range(1, len(name) + 1):
        for start in range(1 if end == len(name) else 0, end):
            score = scores.get(name[start:end])
            if score is not None and best[start] + score > best[end]:
                best[end] = best[start] + score
    return best[-1]
