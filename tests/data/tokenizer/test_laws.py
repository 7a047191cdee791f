"""The laws that every kind of tokenizer keeps."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.tokenizer import LibraryTokenizer, TextStream, Tokenizer, tokenizer_from_dict

KINDS = ["bytes", "characters", "byte_pairs", "word_pieces", "unigram", "gpt2"]
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request, kinds) -> Tokenizer:
    return kinds[request.param]


@given(text=texts)
def test_any_text_comes_back_byte_for_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert np.array_equal(tokenizer.encode(text.encode()), ids)
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@given(data=st.binary(max_size=60))
def test_bytes_that_are_not_utf8_come_back_too(tokenizer, data):
    if not isinstance(tokenizer, LibraryTokenizer):
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_texts_that_are_hard_on_tokenizers_come_back(tokenizer):
    for text in (
        "\0" * 50,
        "\ufeffmark",
        "a\r\nb\r",
        "\ud7ff\ue000",
        " " * 500,
        "x" * 70_000,
        "=" * 3000,
        "\u3000" * 90,
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_end_and_special_tokens_have_no_bytes_and_no_text_spells_them(tokenizer):
    outside = [tokenizer.end_id, *tokenizer.specials.values()]
    assert outside == list(range(tokenizer.end_id, tokenizer.vocab_size))
    assert [tokenizer.token_bytes(token) for token in outside] == [b""] * len(outside)
    assert tokenizer.byte_lengths().tolist() == [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    ids = tokenizer.encode("end <end> mask [MASK] <mask> <|endoftext|> </s>")
    assert ids.max() < tokenizer.end_id
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=r"token id \(-?\d+\) must lie in 0.."):
            tokenizer.decode([token])


@given(batch=st.lists(texts, max_size=5))
def test_a_batch_is_its_texts_one_by_one(tokenizer, batch):
    together = tokenizer.encode_batch(batch)
    assert [ids.tolist() for ids in together] == [tokenizer.encode(text).tolist() for text in batch]


@given(text=texts, cuts=st.lists(st.integers(1, 4), min_size=1))
def test_a_stream_gives_the_whole_text_and_never_half_a_character(tokenizer, text, cuts):
    stream, ids, shown = TextStream(tokenizer), tokenizer.encode(text).tolist(), []
    while ids:
        size = cuts[len(shown) % len(cuts)]
        shown.append(stream.push(ids[:size]))
        ids = ids[size:]
    assert "".join(shown) == text
    assert stream.finish() == ""


def test_plain_data_rebuilds_an_equal_tokenizer(tokenizer, source):
    plain = json.loads(json.dumps(tokenizer.to_dict()))
    again = tokenizer_from_dict(plain)
    assert again.to_dict() == tokenizer.to_dict()
    assert (again.vocab_size, again.end_id, again.specials) == (
        tokenizer.vocab_size,
        tokenizer.end_id,
        tokenizer.specials,
    )
    for text in source:
        assert np.array_equal(again.encode(text), tokenizer.encode(text))


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"cannot be written as UTF-8: '\\udc80' at character 2"):
        tokenizer.encode("ab\udc80")
