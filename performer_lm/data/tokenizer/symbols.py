"""Tokens with names of their own, for made-up languages: a text is names with spaces between them."""

from collections.abc import Sequence
from typing import Any, final

import numpy as np

from performer_lm.data.tokenizer.base import Ids, Text, Tokenizer
from performer_lm.data.tokenizer.utf8 import as_str
from performer_lm.wording import short


@final
class SymbolTokenizer(Tokenizer):
    """Each id is a name without spaces, which is written with a space after it."""

    def __init__(self, *, names: Sequence[str]) -> None:
        self._ids = {name: token for token, name in enumerate(names)}
        super().__init__([f"{name} ".encode() for name in names])

    def encode_batch(self, texts: Sequence[Text]) -> list[Ids]:
        return [np.array([self._id(name) for name in as_str(text).split()], dtype=np.int64) for text in texts]

    def _id(self, name: str) -> int:
        if name not in self._ids:
            raise ValueError(f"{short(name)} is no symbol; there are {', '.join([*self._ids][:8])}, ...")
        return self._ids[name]

    def _plain(self) -> dict[str, Any]:
        return {"kind": "symbols", "names": list(self._ids)}


def read_symbols(plain: dict[str, Any], *, specials: Sequence[str]) -> SymbolTokenizer:
    """Build the tokenizer that plain data describes, or raise ValueError in one line."""
    names = plain.get("names")
    right = isinstance(names, list) and all(isinstance(name, str) and name.split() == [name] for name in names)
    if not isinstance(names, list) or not right or len(set(names)) < len(names) or specials:
        raise ValueError(f"tokenizer data: names ({short(names)}) must be a list of different words")
    for name in names:
        name.encode("utf-8")
    return SymbolTokenizer(names=names)
