import re
from typing import Any

import pytest

from performer_lm.data.tokenizer import tokenizer_from_dict
from performer_lm.data.tokenizer.byte_level import BYTE_NAMES

BYTES = [[name, -1.0] for name in BYTE_NAMES]
DOUBLED = [[97, 97], *([token, token] for token in range(256, 320))]


def endless(levels: int = 60) -> Any:
    """Return lists of lists, which double at every level and are few objects."""
    found: Any = []
    for _ in range(levels):
        found = [found, found]
    return found


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (
            None,
            "kind (None) must be one of bytes, byte_pairs, characters, symbols, tokenizer_json, unigram,",
        ),
        ({"kind": ["bytes"]}, "kind (['bytes']) must be"),
        ({"kind": "os.system"}, "kind ('os.system') must be"),
        ({"kind": "bytes", "specials": "mask"}, "specials ('mask') must be a list"),
        ({"kind": "bytes", "specials": [1]}, "1 must be a name"),
        ({"kind": "byte_pairs"}, "split (None) must be one of ['words']"),
        ({"kind": "byte_pairs", "split": {}, "merges": []}, "split ({}) must be one of"),
        ({"kind": "byte_pairs", "split": "words", "merges": "abc"}, "merges ('abc') must be a list"),
        ({"kind": "byte_pairs", "split": "words", "merges": [[1, 2], [3]]}, "merge 1 ([3]) must be a pair"),
        ({"kind": "byte_pairs", "split": "words", "merges": [[1, True]]}, "merge 0 ([1, True]) must be a pair"),
        ({"kind": "byte_pairs", "split": "words", "merges": [[1, 256]]}, "merge 0 ([1, 256]) must use ids in 0..255"),
        ({"kind": "byte_pairs", "split": "words", "merges": [[1, -1]]}, "merge 0 ([1, -1]) must use ids in 0..255"),
        ({"kind": "characters", "alphabet": "aa", "fallback": True}, "alphabet ('aa') must be a string of different"),
        ({"kind": "characters", "alphabet": "a", "fallback": 1}, "fallback (1) must be true or false"),
        ({"kind": "characters", "alphabet": "\ud800", "fallback": True}, "cannot be written as UTF-8"),
        ({"kind": "word_pieces", "split": "words", "pieces": [1]}, "pieces ([1]) must be a list of spelled pieces"),
        ({"kind": "word_pieces", "split": "words", "pieces": ["a"]}, "must differ from each other"),
        ({"kind": "word_pieces", "split": "words", "pieces": ["a b"]}, "piece 'a b' spells no bytes"),
        ({"kind": "word_pieces", "split": "words", "pieces": ["▁"]}, "piece '▁' spells no bytes"),
        ({"kind": "unigram", "split": "words", "pieces": None}, "pieces (None) must be a list"),
        ({"kind": "unigram", "split": "words", "pieces": [["a", -1.0]]}, "must begin with the 256 bytes"),
        ({"kind": "unigram", "split": "words", "pieces": [*BYTES, ["ab", float("inf")]]}, "piece 256 (['ab', inf])"),
        ({"kind": "unigram", "split": "words", "pieces": [*BYTES, ["", -1.0]]}, "piece '' spells no bytes"),
        ({"kind": "symbols", "names": ["a b"]}, "names (['a b']) must be a list of different words"),
        ({"kind": "symbols", "names": ["a", "a"]}, "names (['a', 'a']) must be a list of different words"),
        ({"kind": "symbols", "names": [""]}, "names ([''])"),
        ({"kind": "tokenizer_json", "content": []}, "content ([]) must be a parsed tokenizer.json"),
        ({"kind": "tokenizer_json", "content": {}, "size": 2**40}, "size (1099511627776) must be whole numbers up to"),
        ({"kind": "tokenizer_json", "content": {}, "end_ids": 1}, "end_ids (1) must be a list"),
        ({"kind": "tokenizer_json", "content": {}, "end_ids": [-1]}, "end_ids ([-1]) must be whole numbers up to"),
        ({"kind": "tokenizer_json", "content": {}, "begin_id": True}, "begin_id (True) must be whole numbers up to"),
        ({"kind": "bytes", "chat_template": 3}, "chat_template (3) must be a text"),
    ],
)
def test_foreign_data_is_refused_in_one_line(plain, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        tokenizer_from_dict(plain)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"kind": "byte_pairs", "split": "words", "merges": DOUBLED}, "merge 10 ([265, 265]) makes a piece of 2,048 b"),
        ({"kind": "byte_pairs", "split": "words", "merges": [[0, 0]] * (1 << 23)}, "'merges' has 8,388,608 entries"),
        (
            {"kind": "word_pieces", "split": "words", "pieces": ["a" * 1025]},
            "spells 1,025 bytes; a word has at most 1,",
        ),
        ({"kind": "unigram", "split": "words", "pieces": [*BYTES, ["a" * 9999, -1.0]]}, "spells 9,999 bytes"),
        ({"kind": "characters", "alphabet": "a" * (1 << 23), "fallback": True}, "'alphabet' has 8,388,608 entries"),
        ({"kind": endless()}, "kind ([[[[[[[...], [...]]"),
        ({"kind": "bytes", "specials": [endless()]}, "must be a name such as mask"),
        ({"kind": "byte_pairs", "split": "words", "merges": endless()}, "merge 0 ([[[[[[[...], [...]]"),
        ({"kind": "unigram", "split": "words", "pieces": endless()}, "piece 0 ([[[[[[[...], [...]]"),
        ({"kind": "symbols", "names": endless()}, "names ([[[[[[[...], [...]]"),
    ],
    ids=range(10),
)
def test_data_that_would_grow_without_end_is_refused(plain: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        tokenizer_from_dict(plain)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300
