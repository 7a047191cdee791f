import math

from performer_lm.data.tokenizer import UnigramTokenizer, train_unigram
from performer_lm.data.tokenizer.byte_level import BYTE_NAMES
from performer_lm.data.tokenizer.unigram import _count_words, _without

BYTES = [(name, -9.0) for name in BYTE_NAMES]


def test_a_word_is_written_with_its_likeliest_pieces():
    tokenizer = UnigramTokenizer(pieces=[*BYTES, ("ab", -3.0), ("bc", -1.0), ("abc", -12.0)], split="words")
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("abc")] == [b"a", b"bc"]


def test_words_are_counted_by_what_they_are_made_of():
    assert _count_words([b"a b a b a", b"\xff a"]) == {"a": 1, "Ġb": 2, "Ġa": 3}


def test_what_replaces_a_piece_is_the_best_of_shorter_ones():
    scores = {"a": -5.0, "b": -5.0, "c": -5.0, "ab": -3.0, "bc": -4.0, "abc": -1.0}
    assert _without("abc", scores) == -8.0
    assert _without("ab", scores) == -10.0


def test_scores_are_the_logs_of_shares_and_frequent_words_stay_whole():
    tokenizer = train_unigram([b"the cat and the dog and the end " * 50], vocab_size=266)
    scores = dict(tokenizer._scored)
    assert 0.99 < sum(math.exp(score) for score in scores.values()) < 1.01
    assert "Ġthe" in scores
