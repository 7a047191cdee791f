import re

import pytest

from performer_lm.data.tokenizer import ByteTokenizer, TextStream

BYTES = ByteTokenizer(specials=["mask", "answer"])


def test_a_stream_ends_an_unfinished_character_with_the_replacement_character():
    stream = TextStream(BYTES)
    assert stream.push(BYTES.encode("é")[:1]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_follow_the_end_and_answer_to_their_names():
    assert (BYTES.end_id, BYTES.special_id("mask"), BYTES.special_id("answer"), BYTES.vocab_size) == (
        256,
        257,
        258,
        259,
    )
    with pytest.raises(ValueError, match=r"no special token 'msak'; did you mean mask\?"):
        BYTES.special_id("msak")
    with pytest.raises(ValueError, match=r"no special token 'mask'; tokenizer.specials=\[mask\] adds it"):
        ByteTokenizer().special_id("mask")


def test_without_special_tokens_the_plain_data_is_what_it_always_was():
    assert ByteTokenizer().to_dict() == {"kind": "bytes"}
    assert BYTES.to_dict() == {"kind": "bytes", "specials": ["mask", "answer"]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a b"], "'a b' must be a name such as mask"),
        (["end"], "'end' must be a name such as mask, and not end"),
        ([3], "3 must be a name"),
        (["mask", "mask"], "(mask, mask) must differ from each other"),
    ],
)
def test_special_tokens_without_a_name_of_their_own_are_refused(names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ByteTokenizer(specials=names)
