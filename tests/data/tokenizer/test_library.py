import copy
import json
import random
import struct
from base64 import b64encode

import pytest

from performer_lm.data.tokenizer import LibraryTokenizer, tokenizer_from_dict


def test_a_byte_level_file_is_exact_and_its_special_tokens_are_no_text(tokenizer_json):
    content = tokenizer_json("gpt2")
    tokenizer = LibraryTokenizer(content=content, specials=["mask"])
    assert tokenizer.end_id == len(content["model"]["vocab"])
    assert tokenizer.token_bytes(content["model"]["vocab"]["<|endoftext|>"]) == b""
    text = "a <|endoftext|> in a text"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_file_with_spaces_as_marks_gives_its_pieces_as_text(tokenizer_json):
    content = tokenizer_json("llama")
    vocabulary, tokenizer = content["model"]["vocab"], LibraryTokenizer(content=content)
    ids = tokenizer.encode("return \N{SNOWMAN} name")
    assert tokenizer.decode(ids) == " return \N{SNOWMAN} name"  # the space before the first word is the file's own
    assert tokenizer.token_bytes(vocabulary["<0x0A>"]) == b"\n"
    assert tokenizer.token_bytes(vocabulary["▁"]) == b" "
    assert tokenizer.token_bytes(vocabulary["</s>"]) == b""


def test_a_file_that_loses_text_still_gives_pieces_to_print(tokenizer_json):
    content = tokenizer_json("bert")
    vocabulary, tokenizer = content["model"]["vocab"], LibraryTokenizer(content=content)
    ids = tokenizer.encode("Return  the NAME \N{SNOWMAN}")
    assert vocabulary["[CLS]"] not in ids
    assert tokenizer.decode(ids).split() == ["return", *tokenizer.decode(ids).split()[1:]]
    assert tokenizer.token_bytes(vocabulary["[UNK]"]) == b""


def test_ends_and_room_of_a_model_are_ids_of_the_table(tokenizer_json):
    content = tokenizer_json("gpt2")
    end, size = content["model"]["vocab"]["<|endoftext|>"], 2 * len(content["model"]["vocab"])
    tokenizer = LibraryTokenizer(content=content, size=size, end_ids=[end, 9], begin_id=7, specials=["mask"])
    tokenizer.chat_template = "{{ messages }}"
    assert (tokenizer.end_id, tokenizer.end_ids, tokenizer.begin_id) == (end, (end, 9), 7)
    assert (tokenizer.num_pieces, tokenizer.special_id("mask"), tokenizer.vocab_size) == (size, size, size + 1)
    assert {tokenizer.token_bytes(token) for token in (end, 7, 9, size - 1, size)} == {b""}
    assert tokenizer.begin([5]) == [7, 5]
    lengths = tokenizer.equal_lengths(2.5)
    assert [token for token in range(size + 1) if not lengths[token]] == sorted({end, 9, size})
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict()
    assert (again.end_ids, again.begin_id, again.vocab_size) == (tokenizer.end_ids, 7, size + 1)
    assert again.chat_template == "{{ messages }}"


def test_without_ends_of_its_own_a_text_begins_after_the_end(tokenizer_json):
    tokenizer = LibraryTokenizer(content=tokenizer_json("gpt2"))
    assert (tokenizer.begin([]), tokenizer.begin([5])) == ([tokenizer.end_id], [5])
    assert (tokenizer.end_ids, tokenizer.num_pieces) == ((tokenizer.end_id,), tokenizer.end_id)
    assert set(tokenizer.to_dict()) == {"kind", "content"}


def test_only_where_it_is_asked_for_a_text_spells_special_tokens(tokenizer_json):
    content = tokenizer_json("gpt2")
    tokenizer, end = LibraryTokenizer(content=content), content["model"]["vocab"]["<|endoftext|>"]
    text = "return <|endoftext|> name"
    assert end not in tokenizer.encode(text)
    marked = tokenizer.encode_marked(text).tolist()
    assert marked.count(end) == 1
    assert tokenizer.decode(marked) == "return  name"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 3}, "ids, and there is room for 3"),
        ({"end_ids": [10**6]}, "and none is 1000000"),
        ({"begin_id": 10**6}, "and none is 1000000"),
    ],
)
def test_ids_that_the_table_does_not_have_are_refused(tokenizer_json, options, message):
    with pytest.raises(ValueError, match=message):
        LibraryTokenizer(content=tokenizer_json("gpt2"), **options)


def test_what_makes_encoding_random_or_shorter_is_left_out(tokenizer_json):
    content = tokenizer_json("gpt2")
    content["model"]["dropout"] = 0.5
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = LibraryTokenizer(content=content)
    plain = LibraryTokenizer(content=tokenizer_json("gpt2"))
    for _ in range(5):
        assert tokenizer.encode("return self.greet(name)").tolist() == plain.encode("return self.greet(name)").tolist()


def test_added_tokens_that_are_not_special_are_text(tokenizer_json):
    content = tokenizer_json("gpt2")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"].append({"id": 300, "content": "<tool>", **flags})
    tokenizer = LibraryTokenizer(content=content)
    assert tokenizer.encode("a<tool>b").tolist()[1] == 300
    assert tokenizer.decode(tokenizer.encode("a<tool>b")) == "a<tool>b"
    assert tokenizer.end_id == 301


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model (None) must be a section"),
        ({"model": {"type": "Nothing"}}, "tokenizer.json: "),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}, "it has no tokens"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 4_000_000_000}, "unk_token": "a"}}, "ids reach 4000000000"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}}, ""),
    ],
)
def test_content_that_is_no_tokenizer_is_refused_in_one_line(tokenizer_json, change, message):
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as caught:
        LibraryTokenizer(content={**tokenizer_json("gpt2"), **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _places(value, path=()):
    """Yield the path of every value inside plain data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _mutated(plain, draw: random.Random):
    plain = copy.deepcopy(plain)
    path = draw.choice([path for path in _places(plain) if path])
    holder = plain
    for key in path[:-1]:
        holder = holder[key]
    junk = [None, True, -1, 2**40, 0.5, "", "é", "▁x", [], {}, [[]], {"type": "BPE"}, float("nan"), "\ud800"]
    action = draw.randrange(3)
    if action == 0:
        del holder[path[-1]]
    elif action == 1 or not isinstance(holder, list):
        holder[path[-1]] = draw.choice(junk)
    else:
        holder.append(draw.choice([*junk, *holder]))
    return plain


@pytest.mark.parametrize(
    "kind", ["bytes", "characters", "byte_pairs", "word_pieces", "unigram", "gpt2", "llama", "bert"]
)
def test_mutated_data_is_refused_in_one_line_or_gives_ids_in_range(kinds, tokenizer_json, kind):
    good = kinds[kind] if kind in kinds else LibraryTokenizer(content=tokenizer_json(kind), specials=["mask"])
    plain, draw, refused = json.loads(json.dumps(good.to_dict())), random.Random(kind), 0
    for _ in range(120):
        try:
            tokenizer = tokenizer_from_dict(_mutated(plain, draw))
            ids = tokenizer.encode("return self.greet(name) \N{SNOWMAN}\n\0 é")
        except ValueError as error:
            refused += "\n" not in str(error) or pytest.fail(f"more than one line: {error}")
            continue
        assert ids.min(initial=0) >= 0
        assert ids.max(initial=0) < tokenizer.end_id < tokenizer.vocab_size
        assert len(tokenizer.byte_lengths()) == tokenizer.vocab_size
    assert refused


TWICE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
INSERT = {"type": "Replace", "pattern": {"Regex": ""}, "content": "b"}
TABLE = b64encode(struct.pack("<I", 4) + b"trie" + b"a\0" + b"b" * 9000 + b"\0").decode()


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("grows", [[TWICE] * 60, [INSERT] * 60, [{**TWICE, "content": "a" * 9000}], [[TWICE] * 7] * 2])
def test_a_file_that_lengthens_texts_without_measure_is_refused(tokenizer_json, part, grows):
    content = tokenizer_json("llama")
    inside = {"normalizer": "normalizers", "decoder": "decoders"}[part]
    grows = [{"type": "Sequence", inside: item} if isinstance(item, list) else item for item in grows]
    content[part] = {"type": "Sequence", inside: grows}
    with pytest.raises(ValueError, match=rf"tokenizer\.json: its {part} may make a text over 4,096 times as long"):
        LibraryTokenizer(content=content)


def test_tables_of_replacements_and_tokens_are_bounded(tokenizer_json):
    content = tokenizer_json("llama")
    long = copy.deepcopy(content)
    long["model"]["vocab"]["a" * 5000] = len(long["model"]["vocab"])
    with pytest.raises(ValueError, match="a token of 5,000 characters; at most 4,096 are read"):
        LibraryTokenizer(content=long)
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": TABLE}
    with pytest.raises(ValueError, match="its normalizer may make a text over 4,096 times as long"):
        LibraryTokenizer(content=content)
