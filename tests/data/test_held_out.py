import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.held_out import BOTH, HELD_OUT, NEITHER, TRAIN, split_documents, split_text
from performer_lm.data.survey import DIGEST, Survey, digest_of, place_of

fractions = st.floats(0.001, 0.999)


def survey(sizes: dict[str, int], *, texts: list[str] | None = None, corpora=None, given=None) -> Survey:
    """Return a survey of documents by name and size; without texts, all texts differ."""
    count = len(sizes)
    return Survey(
        corpora=np.array(corpora or [0] * count),
        sizes=np.array(list(sizes.values())),
        places=np.array([place_of(name) for name in sizes]),
        digests=np.frombuffer(b"".join(digest_of(text.encode()) for text in texts or sizes), dtype=DIGEST),
        given=np.array(given or [-1] * count),
        content_hash=hashlib.sha256(b"").hexdigest(),
    )


def held_out(sizes: dict[str, int], *, fraction: float) -> set[str]:
    sides = split_documents(survey(sizes), fraction=fraction).sides
    return {name for name, side in zip(sizes, sides, strict=True) if side == HELD_OUT}


@given(sizes=st.dictionaries(st.text(max_size=8), st.integers(1, 1000), min_size=2, max_size=40), fraction=fractions)
def test_a_split_has_something_on_each_side(sizes, fraction):
    split = split_documents(survey(sizes), fraction=fraction)
    assert set(split.sides) == {TRAIN, HELD_OUT}
    assert split.num_moved == 0


def test_documents_stay_on_their_side_when_others_come():
    few = {f"{index}.txt": 10 for index in range(500)}
    many = {f"{index}.txt": 10 for index in range(1000)}
    small, large = held_out(few, fraction=0.1), held_out(many, fraction=0.1)
    assert small <= large
    assert 60 < len(large) < 140
    assert large <= held_out(many, fraction=0.2)


def test_a_document_larger_than_the_held_out_share_is_trained_on():
    sizes = {f"{index}.txt": 10 for index in range(500)}
    chosen = min(held_out(sizes, fraction=0.1))
    assert chosen not in held_out({**sizes, chosen: 5000}, fraction=0.1)


copies = st.integers(1, 25).flatmap(
    lambda count: st.tuples(
        st.lists(st.sampled_from("abcdefgh"), min_size=count, max_size=count),
        st.lists(st.integers(0, 2), min_size=count, max_size=count).map(sorted),
        st.lists(st.sampled_from([-1, -1, -1, 0, 1]), min_size=count, max_size=count),
    )
)


@given(documents=copies, fraction=fractions)
def test_no_text_is_held_out_that_is_also_trained_on(documents, fraction):
    texts, corpora, given_sides = documents
    sizes = {f"{index}": 7 for index in range(len(texts))}
    found = survey(sizes, texts=texts, corpora=corpora, given=given_sides)
    try:
        split = split_documents(found, fraction=fraction)
    except ValueError as error:
        if not str(error).startswith("nothing is left to"):
            raise
        return
    sides = {side: {text for text, own in zip(texts, split.sides, strict=True) if own == side} for side in range(4)}
    assert not sides[TRAIN] & sides[HELD_OUT]
    assert sides[NEITHER] <= sides[TRAIN]
    for corpus in set(corpora):
        mine = [
            (side, own) for own, side, which in zip(split.sides, given_sides, corpora, strict=True) if which == corpus
        ]
        if any(side >= 0 for side, _ in mine):
            assert all(own == TRAIN for side, own in mine if side != 1)
        elif len(mine) == 1:
            assert mine[0][1] == BOTH


def test_copies_fall_together_and_are_counted_where_they_cannot():
    sizes = {f"{index}": 10 for index in range(400)}
    texts = [str(index % 100) for index in range(400)]
    split = split_documents(survey(sizes, texts=texts), fraction=0.5)
    assert split.num_moved == 0
    assert len(set(np.reshape(split.sides, (4, 100)).sum(0))) == 2
    given_sides = [1 if index < 2 else 0 for index in range(4)]
    split = split_documents(
        survey({"a": 1, "b": 1, "c": 1, "d": 1}, texts=list("xyxz"), given=given_sides), fraction=0.1
    )
    assert (split.sides.tolist(), split.num_moved) == ([NEITHER, HELD_OUT, TRAIN, TRAIN], 1)


def test_what_leaves_nothing_to_validate_or_train_on_is_refused():
    with pytest.raises(ValueError, match="nothing is left to validate on: the text of all 1 documents held out, of 3,"):
        split_documents(survey({"a": 1, "b": 1, "c": 1}, texts=["x", "x", "x"]), fraction=0.3)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        split_documents(survey({"a": 1, "b": 1}, given=[1, 1]), fraction=0.3)


@given(text=st.text(alphabet="ab\nü€\N{GRINNING FACE}", min_size=2, max_size=80).map(str.encode), fraction=fractions)
def test_a_single_document_is_cut_between_lines_or_characters(text, fraction):
    train, validation = split_text(text, fraction=fraction)
    assert train + validation == text
    train.decode()
    validation.decode()


def test_a_single_document_is_cut_at_the_first_line_of_its_share():
    assert split_text(b"one\ntwo\nthree\nfour\n", fraction=0.5) == (b"one\ntwo\nthree\n", b"four\n")
    assert split_text(b"one\ntwo\n", fraction=0.5) == (b"one\n", b"two\n")
    assert split_text(b"no line at all", fraction=0.5) == (b"no line", b" at all")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction must be"):
        split_documents(survey({"a": 1, "b": 1}), fraction=fraction)
    with pytest.raises(ValueError, match="fraction must be"):
        split_text(b"abc", fraction=fraction)
