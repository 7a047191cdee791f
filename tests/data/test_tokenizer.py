import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from performer_lm.data import tokenizer as room
from performer_lm.data.tokenizer import (
    BYTE_NAMES,
    BytePairTokenizer,
    ByteTokenizer,
    TextStream,
    build_bytes,
    tokenizer_from_dict,
    train_byte_pairs,
)

SOURCE = [
    b"def greet(self, name):\n    if name is None:\n        return self.greet('world')\n    return name\n" * 3,
    "Grüße aus Köln, 你好, здравствуй \N{GRINNING FACE}\r\n\tdone.\0\n".encode(),
]
BYTES = ByteTokenizer()
PAIRS = train_byte_pairs(SOURCE, vocab_size=320)
both = pytest.mark.parametrize("tokenizer", [BYTES, PAIRS], ids=["bytes", "byte_pairs"])
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@both
@given(text=texts)
def test_any_text_comes_back_byte_for_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert np.array_equal(tokenizer.encode(text.encode()), ids)
    assert tokenizer.end_id not in ids
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@given(data=st.binary(max_size=60))
def test_the_byte_tokenizer_takes_any_bytes(data):
    assert BYTES.decode_bytes(BYTES.encode(data)) == data


@both
def test_the_end_token_is_the_last_id_and_has_no_bytes(tokenizer):
    assert tokenizer.end_id == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes(tokenizer.end_id) == b""
    assert tokenizer.byte_lengths().tolist() == [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    with pytest.raises(ValueError, match=r"token id \(-1\) must lie in 0.."):
        tokenizer.decode([-1])


@both
@given(batch=st.lists(texts, max_size=5))
def test_a_batch_is_its_texts_one_by_one(tokenizer, batch):
    together = tokenizer.encode_batch(batch)
    assert [ids.tolist() for ids in together] == [tokenizer.encode(text).tolist() for text in batch]


@both
@given(text=texts, cuts=st.lists(st.integers(1, 4), min_size=1))
def test_a_stream_gives_the_whole_text_and_never_half_a_character(tokenizer, text, cuts):
    stream, ids, shown = TextStream(tokenizer), tokenizer.encode(text).tolist(), []
    while ids:
        size = cuts[len(shown) % len(cuts)]
        shown.append(stream.push(ids[:size]))
        ids = ids[size:]
    assert "".join(shown) == text
    assert stream.finish() == ""


def test_a_stream_ends_an_unfinished_character_with_the_replacement_character():
    stream = TextStream(BYTES)
    assert stream.push(BYTES.encode("é")[:1]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


@both
def test_plain_data_rebuilds_an_equal_tokenizer(tokenizer):
    plain = json.loads(json.dumps(tokenizer.to_dict()))
    again = tokenizer_from_dict(plain)
    assert again.to_dict() == tokenizer.to_dict()
    assert again.vocab_size == tokenizer.vocab_size
    for text in SOURCE:
        assert np.array_equal(again.encode(text), tokenizer.encode(text))


def test_our_byte_names_are_the_library_s():
    assert sorted(BYTE_NAMES) == sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é\n~\xad")
    assert "".join(part for part, _ in spelled) == "".join(BYTE_NAMES[value] for value in "é\n~\xad".encode())


def test_training_fills_the_vocabulary_and_shortens_text():
    assert PAIRS.vocab_size == 320
    assert len(PAIRS.encode(SOURCE[0])) < len(SOURCE[0]) / 3
    assert train_byte_pairs([b"ab"], vocab_size=4096).vocab_size == 258  # one merge is all there is
    assert train_byte_pairs([], vocab_size=257).vocab_size == 257
    assert build_bytes(SOURCE).vocab_size == 257


def test_training_is_the_same_in_another_process():
    program = (
        "import json, sys; from performer_lm.data.tokenizer import train_byte_pairs;"
        "print(json.dumps(train_byte_pairs(map(bytes.fromhex, sys.argv[1:]), vocab_size=320).to_dict()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *(text.hex() for text in SOURCE)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == PAIRS.to_dict()


def test_merges_that_make_the_same_bytes_share_an_id():
    a, b, c = b"abc"
    tokenizer = BytePairTokenizer(merges=[[a, b], [b, c], [256, c], [a, 257]], split="words")
    assert tokenizer.vocab_size == 256 + 3 + 1
    assert tokenizer.token_bytes(258) == b"abc"


def test_a_long_text_is_cut_at_lines_and_comes_back(monkeypatch):
    monkeypatch.setattr(room, "LONGEST_PART", 10)
    monkeypatch.setattr(room, "PARTS_AT_ONCE", 3)
    text = "one line\nand another\n\n" + "x" * 35 + "\nend"
    assert list(room._parts(text))[:2] == ["one line\n", "and anothe"]
    assert [PAIRS.decode(ids) for ids in PAIRS.encode_batch([text, "short", text])] == [text, "short", text]


@both
def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"cannot be written as UTF-8: '\\udc80' at character 2"):
        tokenizer.encode("ab\udc80")


def test_byte_pairs_refuse_bytes_that_are_not_utf8():
    with pytest.raises(ValueError, match=r"not UTF-8: byte 0xff at 2"):
        PAIRS.encode(b"ab\xff")


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size \(256\) must be at least 257"):
        train_byte_pairs(SOURCE, vocab_size=256)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (None, "kind (None) must be"),
        ({"kind": ["bytes"]}, "kind (['bytes']) must be"),
        ({"kind": "os.system"}, "kind ('os.system') must be"),
        ({"kind": "byte_pairs"}, "split (None) must be one of ['words']"),
        ({"kind": "byte_pairs", "split": {}, "merges": []}, "split ({}) must be one of"),
        ({"kind": "byte_pairs", "split": "words", "merges": "abc"}, "merges ('abc') must be a list"),
        ({"kind": "byte_pairs", "split": "words", "merges": [[1, 2], [3]]}, "merge 1 ([3]) must be a pair"),
        ({"kind": "byte_pairs", "split": "words", "merges": [[1, True]]}, "merge 0 ([1, True]) must be a pair"),
        ({"kind": "byte_pairs", "split": "words", "merges": [[1, 256]]}, "merge 0 ([1, 256]) must use ids in 0..255"),
        ({"kind": "byte_pairs", "split": "words", "merges": [[1, -1]]}, "merge 0 ([1, -1]) must use ids in 0..255"),
    ],
)
def test_foreign_data_is_refused_in_one_line(plain, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        tokenizer_from_dict(plain)
    assert "\n" not in str(caught.value)
