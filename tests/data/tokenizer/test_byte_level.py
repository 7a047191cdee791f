import json
import os
import subprocess
import sys

import pytest
from tokenizers import pre_tokenizers

from performer_lm.data.tokenizer import train_byte_pairs, train_unigram, train_word_pieces
from performer_lm.data.tokenizer import utf8 as room
from performer_lm.data.tokenizer.byte_level import BYTE_NAMES, spell, unspell

TRAINERS = {"byte_pairs": train_byte_pairs, "word_pieces": train_word_pieces, "unigram": train_unigram}

PROGRAM = """
import json, sys
from performer_lm.data import tokenizer
texts = list(map(bytes.fromhex, sys.argv[1:]))
print(json.dumps({
    kind: getattr(tokenizer, f"train_{kind}")(texts, vocab_size=700).to_dict()
    for kind in ("byte_pairs", "word_pieces", "unigram")
}))
"""


def test_our_byte_names_are_the_library_s():
    assert sorted(BYTE_NAMES) == sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é\n~\xad")
    assert "".join(part for part, _ in spelled) == "".join(BYTE_NAMES[value] for value in "é\n~\xad".encode())
    assert unspell(spell(bytes(range(256)))) == bytes(range(256))
    assert unspell("▁a") is None


def test_training_is_the_same_in_every_process_on_any_number_of_threads(source):
    words = " ".join(f"word{number * 7919 % 300} other{number % 17}" for number in range(4000)).encode()
    texts = [*source, words]
    found = []
    for seed, threads in ((1, "true"), (2, "false")):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *(text.hex() for text in texts)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed), "TOKENIZERS_PARALLELISM": threads},
        )
        found.append(json.loads(done.stdout))
    here = {kind: train(texts, vocab_size=700).to_dict() for kind, train in TRAINERS.items()}
    assert found == [json.loads(json.dumps(here))] * 2


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_fills_the_vocabulary_and_shortens_text(kind, source):
    train, base = TRAINERS[kind], 512 if kind == "word_pieces" else 256
    tokenizer = train(source, vocab_size=base + 64, specials=["mask"])
    assert tokenizer.vocab_size == base + 64
    assert len(tokenizer.encode(source[0])) < len(source[0]) / 2
    assert train([b"ab"], vocab_size=4096).vocab_size <= base + 4  # little text makes few pieces
    assert train([], vocab_size=base + 1).vocab_size == base + 1
    assert train([b"\xff\xfe"], vocab_size=base + 9).vocab_size == base + 1


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_takes_texts_that_can_be_gone_through_once_only(kind, source):
    assert TRAINERS[kind](iter(source), vocab_size=600).to_dict() == TRAINERS[kind](source, vocab_size=600).to_dict()


def test_a_long_text_is_encoded_in_parts_and_comes_back(monkeypatch, kinds):
    monkeypatch.setattr(room, "LONGEST_PART", 10)
    text = "one line\nand another\n\n" + "x" * 35 + "\nend"
    for kind in TRAINERS:
        assert [kinds[kind].decode(ids) for ids in kinds[kind].encode_batch([text, "", "short", text])] == [
            text,
            "",
            "short",
            text,
        ]
