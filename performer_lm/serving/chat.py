"""Messages of a conversation as one prompt, by the template that came with the tokenizer."""

import datetime
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.wording import first_line

Messages = Sequence[dict[str, Any]]


def encode_messages(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of the prompt that asks for the answer to messages; a template may spell special tokens.

    Raises:
        ValueError: without a template, or for messages that it does not take.
    """
    if tokenizer.chat_template is None:
        raise ValueError("this model's tokenizer has no chat template: /v1/completions continues plain text")
    try:
        text = _compile(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=True, bos_token="", eos_token="", tools=None
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ValueError(f"messages: the chat template refuses them: {first_line(error)}") from error
    return tokenizer.encode_marked(text).tolist() or [tokenizer.end_id]


@lru_cache(maxsize=4)
def _compile(template: str) -> Template:
    """Compile a template as Hugging Face writes chat templates; it reaches nothing but its arguments."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
