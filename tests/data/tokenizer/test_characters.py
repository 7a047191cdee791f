import re

import numpy as np
import pytest

from performer_lm.data.tokenizer import CharacterTokenizer, learn_characters

TEXTS = ["abba ü\n".encode(), "über c".encode()]


def test_without_a_fallback_the_ids_are_the_characters_sorted():
    tokenizer = learn_characters(TEXTS, vocab_size=None, fallback=False)
    assert tokenizer.to_dict()["alphabet"] == "\n abcerü"
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode("abü\n").tolist() == [2, 3, 7, 0]
    assert tokenizer.token_bytes(7) == "ü".encode()


def test_without_a_fallback_other_characters_are_refused_by_name():
    tokenizer = learn_characters(TEXTS, vocab_size=None, fallback=False)
    with pytest.raises(ValueError, match=re.escape(r"no character '\u20ac' (one of 2 such)")):
        tokenizer.encode("a€ b z €")
    with pytest.raises(ValueError, match="not UTF-8: byte 0xff"):
        tokenizer.encode(b"a\xff")


def test_with_a_fallback_ascii_is_its_byte_and_other_characters_are_bytes():
    tokenizer = learn_characters(TEXTS, vocab_size=None, fallback=True)
    assert tokenizer.vocab_size == 256 + 1 + 1
    assert tokenizer.encode("aü€z").tolist() == [97, 256, *"€".encode(), 122]
    assert tokenizer.encode(b"\xff\xc3").tolist() == [0xFF, 0xC3]


def test_the_most_frequent_characters_get_the_ids_there_are():
    texts = ["äääöööüüéè".encode()]
    tokenizer = learn_characters(texts, vocab_size=256 + 2 + 1, fallback=True)
    assert tokenizer.to_dict()["alphabet"] == "äö"
    narrow = learn_characters(texts, vocab_size=5, fallback=False, specials=["mask"])
    assert narrow.vocab_size == 5
    assert narrow.to_dict()["alphabet"] == "äöü"


def test_ids_are_the_code_points_of_a_dense_alphabet():
    alphabet = "".join(map(chr, range(0x4E00, 0x9000)))
    tokenizer = CharacterTokenizer(alphabet=alphabet, fallback=False)
    assert np.array_equal(tokenizer.encode(alphabet), np.arange(len(alphabet)))
