"""Small tokenizers of every kind, and tokenizer.json files of the families that people use."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from performer_lm.data.tokenizer import (
    ByteTokenizer,
    LibraryTokenizer,
    Tokenizer,
    learn_characters,
    train_byte_pairs,
    train_unigram,
    train_word_pieces,
)

SOURCE = [
    b"def greet(self, name):\n    if name is None:\n        return self.greet('world')\n    return name\n" * 3,
    "Grüße aus Köln, 你好, здравствуй \N{GRINNING FACE}\r\n\tdone.\0\n".encode(),
]
SPECIALS = ["mask", "answer"]


def _gpt2() -> Any:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    return library, trainer


def _llama() -> Any:
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    return library, trainers.BpeTrainer(vocab_size=330, special_tokens=special[:3], show_progress=False)


def _bert() -> Any:
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    return library, trainer


FAMILIES = {"gpt2": _gpt2, "llama": _llama, "bert": _bert}


@pytest.fixture(scope="session")
def source() -> list[bytes]:
    """Return texts to learn from."""
    return SOURCE


@pytest.fixture(scope="session")
def tokenizer_json() -> Callable[..., dict[str, Any]]:
    """Return a function from the name of a family to the parsed tokenizer.json of a small one."""

    def build(family: str) -> dict[str, Any]:
        library, trainer = FAMILIES[family]()
        library.train_from_iterator([text.decode() for text in SOURCE], trainer)
        if family == "bert":
            library.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
        content: dict[str, Any] = json.loads(library.to_str())
        if family == "llama":  # bytes that are tokens, as in the real ones
            vocabulary = content["model"]["vocab"]
            for value in range(256):
                vocabulary.setdefault(f"<0x{value:02X}>", len(vocabulary))
        return content

    return build


@pytest.fixture(scope="session")
def kinds(tokenizer_json: Callable[..., dict[str, Any]]) -> dict[str, Tokenizer]:
    """Return a tokenizer of each kind that takes any text."""
    return {
        "bytes": ByteTokenizer(),
        "characters": learn_characters(SOURCE, vocab_size=None, fallback=True, specials=SPECIALS),
        "byte_pairs": train_byte_pairs(SOURCE, vocab_size=320),
        "word_pieces": train_word_pieces(SOURCE, vocab_size=580, specials=SPECIALS),
        "unigram": train_unigram(SOURCE, vocab_size=320, specials=SPECIALS),
        "gpt2": LibraryTokenizer(content=tokenizer_json("gpt2"), specials=SPECIALS),
    }
