"""Requests of any content become jobs, or are refused in one line."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.model import PerformerLM
from performer_lm.serving.parameters import CHATS, TEXTS
from performer_lm.serving.wire import Asked, Reader

PLAIN = st.none() | st.booleans() | st.integers(-3, 300) | st.sampled_from([2**63, -(10**40), 1e-300, 1e308, 0.5])
PLAIN |= st.floats() | st.text(max_size=5) | st.sampled_from(["\ud800", "97", "-1", "9" * 5000, "user", "text"])
VALUES = st.recursive(
    PLAIN,
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1", "a"]), inside, max_size=3)
    ),
    max_leaves=6,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": VALUES}), max_size=2)


@pytest.fixture(scope="module")
def reader(lively_model: Callable[..., PerformerLM]) -> Reader:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = "{% for each in messages %}{{ each.content }}{% endfor %}"  # type: ignore[attr-defined]
    limits: dict[str, Any] = {"max_rows": 8, "max_prompt_tokens": 50, "max_new_tokens": 20, "timeout": 1.0}
    return Reader(lively_model("model.depth=1", vocab_size=257), tokenizer, name="tiny", **limits)


def bodies(names: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    given = st.dictionaries(st.sampled_from(sorted({*names} - {"model"})), VALUES, max_size=4)
    return st.one_of(given, st.tuples(given, MESSAGES).map(lambda both: {**both[0], "messages": both[1]}))


@pytest.mark.parametrize("is_chat", [False, True])
def test_whatever_is_asked_is_read_or_refused_in_one_line(reader: Reader, is_chat: bool) -> None:
    @given(bodies(CHATS if is_chat else TEXTS))
    def read(body: dict[str, Any]) -> None:
        try:
            asked = reader.read(json.dumps(body).encode(), lambda told: None, is_chat=is_chat)
        except ValueError as error:
            message = str(error)
            assert message
            assert "\n" not in message
            assert len(message) < 400
            assert "object at 0x" not in message
            assert "<class" not in message
            message.encode()
        else:
            assert isinstance(asked, Asked)
            assert 1 <= len(asked.choices) <= 8
            assert all(job.ids and 1 <= job.max_new_tokens <= 20 for job in asked.jobs)

    read()
