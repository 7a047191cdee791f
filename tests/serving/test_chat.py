from collections.abc import Callable
from typing import Any

import openai
import pytest

from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.text import Row
from performer_lm.model import PerformerLM

RowsOf = Callable[..., list[Row]]

TEMPLATE = """{% for message in messages %}
<{{ message.role }}>{{ message.content | trim }}
{% if loop.last and message.role == 'assistant' %}{{ raise_exception('the last word is the user\\'s') }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_messages_are_answered_where_the_tokenizer_has_a_template(
    serve: Any, tiny: PerformerLM, rows_of: RowsOf
) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = TEMPLATE  # type: ignore[attr-defined]
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": " hello"}]},
    ]
    [row] = rows_of(tiny, "<system>be brief\n<user>hello\n<assistant>", max_tokens=7, seed=4)
    options: dict[str, Any] = {"model": "tiny", "seed": 4, "max_completion_tokens": 7}
    with serve(tiny, tokenizer) as served:
        chats = served.client.chat.completions
        answer = chats.create(messages=messages, logprobs=True, top_logprobs=2, **options)
        parts = [*chats.create(messages=messages, stream=True, **options)]
        for wrong, message in [
            ([], "messages: at least one is needed"),
            ([{"role": "user"}], "messages: wanted objects with a role and a content of text"),
            ([{"role": "assistant", "content": "x"}], "messages: the chat template refuses them: the last word"),
        ]:
            with pytest.raises(openai.BadRequestError, match=message):
                chats.create(messages=wrong, **options)
        tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"  # type: ignore[attr-defined]
        with pytest.raises(openai.BadRequestError, match="the chat template refuses them: access to attribute"):
            chats.create(messages=messages, **options)
        tokenizer.chat_template = TEMPLATE  # type: ignore[attr-defined]
        tokenizer.encode_marked = lambda text: tokenizer.encode(text.replace("<user>", "U"))  # type: ignore[attr-defined]
        marked = chats.create(messages=messages, **options)
    [unlike] = rows_of(tiny, "<system>be brief\nUhello\n<assistant>", max_tokens=7, seed=4)
    assert marked.choices[0].message.content == unlike.text
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", row.text)
    assert [each.logprob for each in choice.logprobs.content] == pytest.approx(row.log_probs)
    assert bytes(byte for each in choice.logprobs.content for byte in each.bytes) == bytes(row.tokens)
    assert {len(each.top_logprobs) for each in choice.logprobs.content} == {2}
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == row.text
    assert parts[-1].choices[0].finish_reason == "length"


def test_without_a_template_messages_are_answered_400_in_one_line(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny) as served, pytest.raises(openai.BadRequestError) as refused:
        served.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert refused.value.body["message"] == (
        "this model's tokenizer has no chat template: /v1/completions continues plain text"
    )
