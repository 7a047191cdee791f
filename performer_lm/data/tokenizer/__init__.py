"""Tokenizers: text to ids and back, built from the training documents or read from a file.

base.py         what every tokenizer does; a stream of ids as text
characters.py   bytes and characters
byte_level.py   what the library's models over bytes share
byte_pairs.py word_pieces.py unigram.py    those, and how they are trained
library.py      any tokenizer.json
plain.py        from plain data
recipes.py      what the configs name
"""

from performer_lm.data.tokenizer.base import TextStream, Tokenizer
from performer_lm.data.tokenizer.byte_pairs import BytePairTokenizer, train_byte_pairs
from performer_lm.data.tokenizer.characters import ByteTokenizer, CharacterTokenizer, learn_characters
from performer_lm.data.tokenizer.library import LibraryTokenizer
from performer_lm.data.tokenizer.plain import tokenizer_from_dict
from performer_lm.data.tokenizer.recipes import TokenizerRecipe
from performer_lm.data.tokenizer.symbols import SymbolTokenizer
from performer_lm.data.tokenizer.unigram import UnigramTokenizer, train_unigram
from performer_lm.data.tokenizer.word_pieces import WordPieceTokenizer, train_word_pieces

__all__ = [
    "BytePairTokenizer",
    "ByteTokenizer",
    "CharacterTokenizer",
    "LibraryTokenizer",
    "SymbolTokenizer",
    "TextStream",
    "Tokenizer",
    "TokenizerRecipe",
    "UnigramTokenizer",
    "WordPieceTokenizer",
    "learn_characters",
    "tokenizer_from_dict",
    "train_byte_pairs",
    "train_unigram",
    "train_word_pieces",
]
