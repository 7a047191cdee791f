import json
import re

import pytest

from performer_lm.data.tokenizer import recipes
from performer_lm.data.tokenizer.recipes import (
    BytePairs,
    Bytes,
    Characters,
    Restored,
    Sample,
    TokenizerFile,
    Unigram,
    WordPieces,
)


@pytest.mark.parametrize("recipe", [BytePairs, WordPieces, Unigram])
def test_a_recipe_trains_what_its_options_say(recipe, source):
    tokenizer = recipe(vocab_size=600, train_bytes=1000, specials=["mask"]).build(source, num_bytes=1000)
    assert tokenizer.special_id("mask") == tokenizer.end_id + 1
    assert tokenizer.vocab_size <= 600


def test_a_recipe_s_key_follows_every_option():
    options = [{"vocab_size": 600}, {"vocab_size": 601}, {"specials": ["mask"]}, {"train_bytes": 7}]
    made = [
        recipe(**{"vocab_size": 600, "train_bytes": 9, **option})
        for recipe in (BytePairs, Unigram)
        for option in options
    ]
    made += [Bytes(), Bytes(specials=["mask"]), Characters(vocab_size=None, fallback=False)]
    keys = [json.dumps(recipe.key(), sort_keys=True) for recipe in made]
    assert len(set(keys)) == len(keys)


def test_a_sample_is_every_kth_document_up_to_its_limit():
    texts = [f"{index:03}".encode() * 10 for index in range(40)]  # 1200 bytes
    assert list(Sample(texts, num_bytes=1200, limit=2000)) == texts
    some = list(Sample(texts, num_bytes=1200, limit=315))
    assert some == texts[::4]
    assert list(Sample([b"x" * 100], num_bytes=100, limit=30)) == [b"x" * 30]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: BytePairs(vocab_size=256, train_bytes=1),
            "tokenizer.vocab_size (256) must be at least 257: 256 bytes, the end token",
        ),
        (
            lambda: Unigram(vocab_size=257, train_bytes=1, specials=["mask"]),
            "must be at least 258: 256 bytes, the end token and the special",
        ),
        (lambda: WordPieces(vocab_size=512, train_bytes=1), "(512) must be at least 513"),
        (lambda: BytePairs(vocab_size=300, train_bytes=0), "train_bytes must be at least 1"),
        (lambda: Characters(vocab_size=200, fallback=True), "tokenizer.vocab_size (200) must be at least 257"),
        (lambda: Bytes(specials=["no name"]), "'no name' must be a name"),
        (lambda: TokenizerFile(path=None, specials=[]), "tokenizer=json needs tokenizer.path=FILE"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_text_is_read(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_a_file_is_read_or_refused_in_one_line(tmp_path, tokenizer_json):
    good = tmp_path / "tokenizer.json"
    good.write_text(json.dumps(tokenizer_json("gpt2")))
    for path in (good, tmp_path):
        assert TokenizerFile(path=str(path), specials=[]).build([], num_bytes=0).encode("a").tolist()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    for name, message in {
        "tokeniser.json": f"No such file or directory; did you mean {good}?",
        "nowhere/x.json": "No such file or directory",
        "broken.json": "is not JSON",
        "list.json": "is not a tokenizer.json",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            TokenizerFile(path=str(tmp_path / name), specials=[])
        assert "\n" not in str(caught.value)


def test_a_file_s_key_follows_its_content_and_not_its_name(tmp_path, tokenizer_json):
    content = tokenizer_json("gpt2")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(content))
    one, other = (TokenizerFile(path=str(tmp_path / name), specials=[]).key() for name in ("a.json", "b.json"))
    content["model"]["merges"].pop()
    (tmp_path / "b.json").write_text(json.dumps(content))
    assert one == other != TokenizerFile(path=str(tmp_path / "b.json"), specials=[]).key()


def test_a_restored_tokenizer_is_the_one_that_was(kinds):
    plain = kinds["unigram"].to_dict()
    assert Restored(plain=plain).build([], num_bytes=0).to_dict() == plain
    with pytest.raises(ValueError, match="kind"):
        Restored(plain={})
    assert recipes.Restored(plain=plain).key() != recipes.Restored(plain={"kind": "bytes"}).key()
