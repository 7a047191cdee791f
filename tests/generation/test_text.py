import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.tokenizer import ByteTokenizer, Tokenizer
from performer_lm.data.tokenizer.base import Ids, Text
from performer_lm.generation.text import Row

LETTERS = st.text(alphabet="abé", max_size=12)


class Pieces(Tokenizer):
    """A tokenizer of given pieces, which only decodes."""

    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        return [np.zeros(0, dtype=np.int64) for _ in texts]

    def _plain(self) -> dict[str, Any]:
        return {}


def cut(data: st.DataObject, text: bytes) -> list[bytes]:
    """Cut bytes into pieces, anywhere."""
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    return [text[start:stop] for start, stop in itertools.pairwise(places)]


def push_all(text: bytes, pieces: list[bytes], stop: list[str]) -> tuple[Row, list[str]]:
    row = Row(Pieces(pieces), stop=stop)
    given_out = [row.push(token, -1.0) for token in range(len(pieces))]
    return row, [*given_out, row.close()]


@given(data=st.data(), text=LETTERS, stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut_into_tokens(
    data: st.DataObject, text: str, stop: list[str]
) -> None:
    row, given_out = push_all(text.encode(), cut(data, text.encode()), stop)
    ends = [place + len(each) for each in stop if (place := text.find(each)) >= 0]
    until = text[: min(ends, default=None)]
    first = min((len(until) - len(each) for each in stop if until.endswith(each)), default=None) if ends else None
    assert row.text == text[:first] == "".join(given_out)
    assert row.ending == ("stop" if ends else "length")


@given(data=st.data(), text=LETTERS)
def test_a_row_without_stop_strings_gives_a_character_with_its_last_byte(data: st.DataObject, text: str) -> None:
    pieces = cut(data, text.encode())
    row, given_out = push_all(text.encode(), pieces, [])
    known = b""
    for piece, out in zip(pieces, given_out, strict=False):
        before, known = known.decode(errors="ignore"), known + piece
        assert before + out == known.decode(errors="ignore")
    assert row.text == text


def test_a_row_that_has_ended_takes_no_more() -> None:
    tokenizer = ByteTokenizer()
    row = Row(tokenizer, stop=["."])
    assert [row.push(token, -0.5) for token in b"ab.c"] == ["a", "b", "", ""]
    assert (row.text, bytes(row.tokens), row.log_probs, row.ending) == ("ab", b"ab.", [-0.5] * 3, "stop")
    row = Row(tokenizer)
    assert [row.push(token, -0.5) for token in (97, tokenizer.end_id, 98)] == ["a", "", ""]
    assert (row.text, row.tokens, row.ending, row.likelihood) == ("a", [97, tokenizer.end_id], "end", -0.5)


def test_a_character_that_is_cut_short_is_replaced_at_the_end() -> None:
    row = Row(ByteTokenizer())
    assert [row.push(token, 0.0) for token in (97, 0xC3)] == ["a", ""]
    assert (row.close(), row.close(), row.text) == ("\ufffd", "", "a\ufffd")


@pytest.mark.parametrize(
    ("stop", "message"), [("", "stop must not be empty"), ("a\ud800", "cannot be written as UTF-8")]
)
def test_stop_strings_that_mean_nothing_are_refused(stop: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(ByteTokenizer(), stop=["ok", stop])
