"""Tokenizers as the `tokenizers` library keeps them: a `tokenizer.json` that gives the same ids and the same text."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.data.tokenizer.byte_level import BYTE_NAMES, ByteLevelTokenizer
from performer_lm.data.tokenizer.word_pieces import INSIDE

END: Final = "<|endoftext|>"


class Exported(NamedTuple):
    """A tokenizer as the library has it, and what tokenizer_config.json says of it."""

    library: Any
    config: dict[str, Any]
    end_ids: list[int]
    begin_id: int


def export_tokenizer(tokenizer: Tokenizer) -> Exported:
    """Return the library's form of a tokenizer, with the same ids; the end and special tokens are special there too.

    Raises:
        ValueError: for a kind of tokenizer that the library has no form for.
    """
    plain = tokenizer.to_dict()
    end_ids = plain.get("end_ids") or [tokenizer.end_id]
    begin_id = plain.get("begin_id", end_ids[0])
    library = _taken(plain) if plain["kind"] == "tokenizer_json" else _built(plain, tokenizer)
    names = {END: end_ids[0], **{f"<|{name}|>": token for name, token in tokenizer.specials.items()}}
    for name, token in names.items():
        if library.id_to_token(token) is None:
            library.add_special_tokens([AddedToken(name, special=True)])
        if library.id_to_token(token) is None:
            raise ValueError(f"tokenizer.json has no place for {name} at id {token}: export.py cannot write it")
    template = plain.get("chat_template")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": library.id_to_token(begin_id),
        "eos_token": library.id_to_token(end_ids[0]),
        "pad_token": library.id_to_token(end_ids[0]),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": template is None,  # a text that spells one is a text
        **({} if template is None else {"chat_template": template}),
    }
    return Exported(library, config, end_ids, begin_id)


def _taken(plain: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a tokenizer.json, without options that shorten a text or add what a model never saw."""
    content = plain["content"]
    processor = content.get("post_processor") if "begin_id" in plain else None
    model = {**content["model"], "dropout": None}
    settled = {**content, "truncation": None, "padding": None, "post_processor": processor, "model": model}
    return tokenizers.Tokenizer.from_str(json.dumps(settled))


def _built(plain: Mapping[str, Any], tokenizer: Tokenizer) -> Any:
    """Return the tokenizer of the library that does what one of ours does."""
    kind = plain["kind"]
    if isinstance(tokenizer, ByteLevelTokenizer):
        library = tokenizers.Tokenizer.from_str(tokenizer.library.to_str())
        unmark = [decoders.Replace(INSIDE, "")] if kind == "word_pieces" else []
        library.decoder = decoders.Sequence([*unmark, decoders.ByteLevel()])
    elif kind == "bytes":
        library = tokenizers.Tokenizer(models.BPE(_numbered(BYTE_NAMES), []))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
    elif kind == "characters" and plain["fallback"]:
        names = [chr(token) if token < 128 else f"<0x{token:02X}>" for token in range(256)]
        names += [tokenizer.token_bytes(token).decode() for token in range(256, tokenizer.end_id)]
        library = tokenizers.Tokenizer(models.BPE(_numbered(names), [], byte_fallback=True))
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    elif kind == "characters":
        library = tokenizers.Tokenizer(models.WordLevel(_numbered(plain["alphabet"]), unk_token=""))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        library.decoder = decoders.Fuse()
    elif kind == "symbols":
        library = tokenizers.Tokenizer(models.WordLevel(_numbered(plain["names"]), unk_token=""))
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        raise ValueError(f"a tokenizer of kind {kind} has no form as a tokenizer.json: export.py cannot write it")
    return library


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: token for token, name in enumerate(names)}
