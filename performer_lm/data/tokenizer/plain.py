"""Tokenizers from plain data of a checkpoint or a cache: checked, then built; nothing in it is run."""

from typing import Any, Final

from performer_lm.data.tokenizer.base import MOST_IDS, Tokenizer
from performer_lm.data.tokenizer.byte_pairs import read_byte_pairs
from performer_lm.data.tokenizer.characters import ByteTokenizer, read_characters
from performer_lm.data.tokenizer.library import read_library
from performer_lm.data.tokenizer.symbols import read_symbols
from performer_lm.data.tokenizer.unigram import read_unigram
from performer_lm.data.tokenizer.word_pieces import read_word_pieces
from performer_lm.wording import short

READERS: Final[dict[str, Any]] = {
    "bytes": lambda plain, *, specials: ByteTokenizer(specials=specials),
    "byte_pairs": read_byte_pairs,
    "characters": read_characters,
    "symbols": read_symbols,
    "tokenizer_json": read_library,
    "unigram": read_unigram,
    "word_pieces": read_word_pieces,
}


def tokenizer_from_dict(plain: Any) -> Tokenizer:
    """Build the tokenizer that `to_dict` described, running nothing of it, or raise ValueError in one line."""
    kind = plain.get("kind") if isinstance(plain, dict) else None
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(f"tokenizer data: kind ({short(kind)}) must be one of {', '.join(READERS)}")
    specials = plain.get("specials", [])
    if not isinstance(specials, list):
        raise ValueError(f"tokenizer data: specials ({short(specials)}) must be a list of names")
    for name, value in plain.items():
        if isinstance(value, list | str) and len(value) > MOST_IDS:
            raise ValueError(f"tokenizer data: {short(name)} has {len(value):,} entries; at most {MOST_IDS:,} are read")
    chat_template = plain.get("chat_template")
    if chat_template is not None and not isinstance(chat_template, str):
        raise ValueError(f"tokenizer data: chat_template ({short(chat_template)}) must be a text")
    tokenizer: Tokenizer = READERS[kind](plain, specials=specials)
    tokenizer.chat_template = chat_template
    return tokenizer
