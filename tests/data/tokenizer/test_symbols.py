import json

import pytest

from performer_lm.data.tokenizer import SymbolTokenizer, TextStream, tokenizer_from_dict


def test_names_are_written_with_spaces_between_them():
    tokenizer = SymbolTokenizer(names=["a", "bb", "."])
    ids = tokenizer.encode("bb  a\n. a").tolist()
    assert ids == [1, 0, 2, 0]
    assert tokenizer.decode(ids) == "bb a . a "
    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids
    assert TextStream(tokenizer).push(ids) == "bb a . a "
    assert tokenizer.vocab_size == tokenizer.end_id + 1 == 4
    with pytest.raises(ValueError, match=r"'c' is no symbol; there are a, bb, \., \.\.\."):
        tokenizer.encode("a c")


def test_plain_data_rebuilds_it():
    tokenizer = SymbolTokenizer(names=["a", "bb"])
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))).to_dict() == tokenizer.to_dict()
