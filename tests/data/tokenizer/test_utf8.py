from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.tokenizer import utf8 as room
from performer_lm.data.tokenizer.utf8 import as_bytes, parts, runs


@given(data=st.binary(max_size=40) | st.text(alphabet="ab\né", max_size=20).map(str.encode))
def test_runs_are_the_whole_text_in_strings_and_broken_bytes(data):
    found = list(runs(data))
    assert b"".join(map(as_bytes, found)) == data
    for run in found:
        assert run
        if isinstance(run, bytes):
            assert all(value >= 0x80 for value in run)


def test_broken_bytes_stand_apart():
    assert list(runs(b"ab\xff\xfec\xe2\x82")) == ["ab", b"\xff\xfe", "c", b"\xe2\x82"]
    assert list(runs(b"\xed\xa0\x80")) == [b"\xed\xa0\x80"]  # a lone surrogate is no character


def test_a_long_text_is_cut_at_lines(monkeypatch):
    monkeypatch.setattr(room, "LONGEST_PART", 10)
    text = "one line\nand another\n\n" + "x" * 35 + "\nend"
    cut = list(parts(text))
    assert cut[:2] == ["one line\n", "and anothe"]
    assert "".join(cut) == text
    assert max(map(len, cut)) == 10
