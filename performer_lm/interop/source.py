"""A foreign model that has been looked at and may be read: its shape, its tokenizer, its weights one at a time."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from performer_lm.data.tokenizer import LibraryTokenizer
from performer_lm.interop.llama import LlamaShape, Read


class Source(NamedTuple):
    """A model whose settings, shapes and tokenizer fit together; none of its weights has been read."""

    name: str  # of its file or folder
    shape: LlamaShape
    tokenizer: LibraryTokenizer
    read: Read  # a weight, in float32, by its name in transformers


def build_tokenizer(
    content: Mapping[str, Any],
    *,
    size: int,
    ends: Iterable[int | None],
    begin: int | None,
    chat_template: str | None,
    marks: Mapping[str, str | None],
    source: str,
) -> LibraryTokenizer:
    """Return the tokenizer of a model, with what a text needs around it.

    Args:
        content: a parsed tokenizer.json.
        size: ids that the model has.
        ends: ids that end a text, the one that ends documents first; None among them counts for nothing.
        begin: the id that stands before a text.
        chat_template: as its file has it.
        marks: spellings of special tokens by the names that chat templates use for them, such as `bos_token`.
        source: for messages.

    Raises:
        ValueError: for a tokenizer that the library does not take, or whose ids the model does not have.
    """
    end_ids: Sequence[int] = [*dict.fromkeys(token for token in ends if token is not None)]
    if not end_ids:
        raise ValueError(f"{source}: no token of it ends a text (eos_token_id)")
    try:
        tokenizer = LibraryTokenizer(content=content, size=size, end_ids=end_ids, begin_id=begin)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    tokenizer.chat_template = None if chat_template is None else _with_marks(chat_template, marks)
    return tokenizer


def _with_marks(template: str, marks: Mapping[str, str | None]) -> str:
    """Return a chat template that says itself how the special tokens are spelled which it names."""
    named = {name: text for name, text in marks.items() if text is not None and name in template}
    return "".join(f"{{%- set {name} = {text!r} -%}}" for name, text in named.items()) + template
