"""A server and OpenAI's client: every answer is the one that generation gives."""

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.batch import complete
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.text import Row
from performer_lm.model import PerformerLM
from performer_lm.serving import scheduler as scheduling

Build = Callable[..., PerformerLM]
BYTES = ByteTokenizer()
ASCII = {"banned_tokens": [*range(128, 256)]}
ENDLESS: dict[str, Any] = {"prompt": "line", "max_tokens": 1000, "banned_tokens": [256]}
HYBRID = ["attn=hybrid", "attn.pattern=[favor,flash]", "model.token_shift=true"]


@pytest.fixture(scope="module")
def tiny(lively_model: Build) -> PerformerLM:
    return lively_model("model.depth=1", vocab_size=257)


def rows_of(
    model: PerformerLM, prompt: str, *, max_tokens: int, seed: int = 0, n: int = 1, **options: Any
) -> list[Row]:
    """Return what generation gives."""
    stop = options.pop("stop", [])
    sampler = Sampler(**options)
    [rows] = complete(
        model, BYTES, [prompt], max_new_tokens=max_tokens, sampler=sampler, seed=seed, num_samples=n, stop=stop
    )
    return rows


def text_of(chunks: Any) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 0, "stream": True},
    {"n": 2, "stop": ["a", "e"]},
    {"frequency_penalty": 1.5, "presence_penalty": 0.5, "stream": True},
    {"logit_bias": {"97": 3.0}, "extra_body": {"top_k": 20, "no_repeat_ngram_size": 2}},
]
PROMPTS = [f"line {index % 7}" * (1 + index % 5) for index in range(64)]


def ask_all(served: Any, requests: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Ask all at once."""

    def ask(request: dict[str, Any]) -> list[str]:
        answer = served.client.completions.create(model="tiny", **request)
        return [text_of(answer)] if request.get("stream") else [choice.text for choice in answer.choices]

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, requests))


def check_64_at_once(served: Any, model: PerformerLM, **more: Any) -> None:
    """Ask for 64 answers of several kinds at once, and compare each with what generation gives."""
    options = [{"seed": kind, "max_tokens": 3 + kind, **KINDS[kind], **more} for kind in range(len(KINDS))]
    kinds = [index % len(KINDS) for index in range(64)]
    asked = [{**options[kind], "prompt": prompt} for kind, prompt in zip(kinds, PROMPTS, strict=True)]
    found = ask_all(served, asked)
    for kind, own in enumerate(options):
        places = [index for index in range(64) if kinds[index] == kind]
        given = {**own, **own.get("extra_body", {})}
        bias = {int(token): amount for token, amount in own.get("logit_bias", {}).items()}
        names = {field.name for field in dataclasses.fields(Sampler)}
        sampler = Sampler(**{**{name: each for name, each in given.items() if name in names}, "logit_bias": bias})
        rows = complete(
            model,
            BYTES,
            [PROMPTS[place] for place in places],
            max_new_tokens=own["max_tokens"],
            sampler=sampler,
            seed=kind,
            num_samples=own.get("n", 1),
            stop=own.get("stop", []),
            batch_size=64,
        )
        assert [found[place] for place in places] == [[row.text for row in each] for each in rows]


@pytest.mark.parametrize("max_rows", [64, 5])
def test_64_answers_at_once_are_those_of_generation(serve: Any, lively_model: Build, max_rows: int) -> None:
    model = lively_model(*HYBRID, vocab_size=257)
    with serve(model, max_rows=max_rows) as served:
        check_64_at_once(served, model)


def test_64_greedy_answers_at_once_in_float32_are_those_of_generation(serve: Any, lively_model: Build) -> None:
    model = lively_model("model.depth=1", vocab_size=257).float()
    with serve(model) as served:
        check_64_at_once(served, model, temperature=0)


def test_tokens_log_probabilities_endings_and_counts_are_those_of_generation(serve: Any, tiny: PerformerLM) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "seed": 5, "n": 3}
    wanted = rows_of(tiny, "line", stop=["a", "b", "c"], **options, **ASCII)
    with serve(tiny) as served:
        answer = served.complete("line", stop=["a", "b", "c"], logprobs=2, **options, **ASCII)
    assert {choice.finish_reason for choice in answer.choices} == {"stop", "length"}
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == sum(len(row.tokens) for row in wanted)
    for choice, row in zip(answer.choices, wanted, strict=True):
        assert choice.finish_reason == row.ending
        assert choice.logprobs.tokens == [chr(token) for token in row.tokens]
        assert choice.logprobs.token_logprobs == pytest.approx(row.log_probs)
        assert choice.logprobs.text_offset == list(range(len(row.tokens)))
        ids = torch.tensor([[*b"line", *row.tokens]])
        with torch.no_grad():
            probabilities = tiny(ids)[0, 3:-1].softmax(-1)
        for told, own, token in zip(choice.logprobs.top_logprobs, probabilities, choice.logprobs.tokens, strict=True):
            assert token in told
            assert sorted(map(math.exp, told.values()))[-2:] == pytest.approx(sorted(own.tolist())[-2:])


def test_a_stream_is_the_whole_answer_in_parts(serve: Any, tiny: PerformerLM) -> None:
    options = {
        "model": "tiny",
        "prompt": ["é", "line"],
        "max_tokens": 9,
        "seed": 2,
        "n": 2,
        "logprobs": 1,
        "echo": False,
    }
    with serve(tiny) as served:
        whole = served.client.completions.create(**options)
        parts = [*served.client.completions.create(**options, stream=True, stream_options={"include_usage": True})]
    assert parts[-1].usage == whole.usage
    for choice in whole.choices:
        own = [each for part in parts for each in part.choices if each.index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert [log_prob for each in own for log_prob in each.logprobs.token_logprobs] == pytest.approx(
            choice.logprobs.token_logprobs
        )
        assert [place for each in own for place in each.logprobs.text_offset] == choice.logprobs.text_offset


def test_prompts_may_be_texts_or_ids_many_or_none_and_are_given_back(serve: Any, tiny: PerformerLM) -> None:
    options: dict[str, Any] = {"max_tokens": 3, "seed": 1}
    with serve(tiny) as served:
        for prompt, texts in [
            ("ab", ["ab"]),
            ([97, 98], ["ab"]),
            (["ab", ""], ["ab", ""]),
            ([[97], [98, 99]], ["a", "bc"]),
            ("", [""]),
        ]:
            answer = served.complete(prompt, echo=True, **options)
            assert [choice.text for choice in answer.choices] == [
                text + rows_of(tiny, text, **options)[0].text for text in texts
            ]
            streamed = [*served.complete(prompt, echo=True, stream=True, **options)]
            assert text_of(streamed) == "".join(choice.text for choice in answer.choices) or len(texts) > 1


def test_answers_without_a_seed_differ(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny) as served:
        assert len({served.complete("line", max_tokens=12).choices[0].text for _ in range(4)}) > 1


def test_the_default_of_a_parameter_is_that_of_openai(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny) as served:
        assert served.complete("line", seed=0).choices[0].text == rows_of(tiny, "line", max_tokens=16)[0].text
        whole = served.post(json={"prompt": "line", "seed": 0, "top_p": None, "stop": None, "n": None}).json()
        assert whole["choices"][0]["text"] == rows_of(tiny, "line", max_tokens=16)[0].text


@pytest.mark.parametrize("words", [["attn=favor"], ["attn=local"], ["attn=exact"]], ids=" ".join)
def test_a_prefix_seen_is_read_no_more_and_answers_stay(serve: Any, lively_model: Build, words: list[str]) -> None:
    model = lively_model(*words, "model.depth=1", vocab_size=257)
    options: dict[str, Any] = {"max_tokens": 6, "seed": 1, "banned_tokens": [256]}
    read: list[int] = []
    extend = model.extend

    def counting(tokens: torch.Tensor, *arguments: Any, **rest: Any) -> Any:
        read.append(tokens.shape[1])
        return extend(tokens, *arguments, **rest)

    model.extend = counting  # type: ignore[method-assign]
    with serve(model) as served:
        first = served.complete("a long beginning", **options, logprobs=0).choices[0]
        read.clear()
        again = served.complete("a long beginning", **options, logprobs=0).choices[0]
        assert again == first  # bit for bit
        assert read == [1] * 5  # the tokens drawn alone
        read.clear()
        row = rows_of(model, "a long beginning", **options)[0]
        talk = [*b"a long beginning", *row.tokens, *b" goes on"]
        read.clear()
        longer = served.complete(talk, **options)
        assert read[0] == 1 + len(" goes on")  # of the answer only the last token was not read
        told = served.scheduler.status()["prefixes"]
        assert (told["hits"], told["misses"], told["tokens_spared"]) == (2, 1, 16 + 21)
    model.extend = extend  # type: ignore[method-assign]
    with serve(model, prefix_bytes=0) as served:
        assert served.complete(talk, **options).choices == longer.choices
        assert served.scheduler.status()["prefixes"] == dict.fromkeys(told, 0)


def test_long_prompts_are_read_in_parts_between_the_tokens_of_others(
    serve: Any, lively_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "READ_AT_ONCE", 8)
    model = lively_model(*HYBRID, vocab_size=257)
    requests = [{"prompt": "word " * count, "seed": count, "max_tokens": 5} for count in (1, 9, 30, 2, 1, 17)]
    with serve(model) as served:
        for _ in range(2):  # the second time from what was kept
            for request, texts in zip(requests, ask_all(served, requests), strict=True):
                assert texts == [rows_of(model, **request)[0].text]


def test_a_client_that_hangs_up_frees_its_rows(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, max_rows=2) as served:
        stream = served.complete(**ENDLESS, n=2, stream=True)
        next(iter(stream))
        assert served.scheduler.status()["running"] == 2
        stream.close()
        eventually(lambda: served.scheduler.status()["running"] == 0)
        with pytest.raises(httpx.TimeoutException):
            served.post(json=ENDLESS, timeout=0.3)
        eventually(lambda: served.scheduler.status()["running"] == 0)
        assert served.complete("line", max_tokens=2).usage.completion_tokens == 2


def test_more_than_may_wait_are_answered_429_in_one_line(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, max_rows=1, max_waiting=1) as served, ThreadPoolExecutor(2) as pool:
        running = pool.submit(served.post, json={**ENDLESS, "max_tokens": 200})
        eventually(lambda: served.scheduler.status()["running"] == 1)
        waiting = pool.submit(served.post, json={**ENDLESS, "max_tokens": 3})
        eventually(lambda: served.scheduler.status()["waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            served.complete("line")
        assert refused.value.body["message"] == "1 prompts wait already (max_waiting): try again later"
        assert [each.result().status_code for each in (running, waiting)] == [200, 200]


def test_what_takes_too_long_is_answered_504_and_a_stream_tells_so(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, timeout=0.5, max_new_tokens=10**6) as served:
        answer = served.post(json={**ENDLESS, "max_tokens": 10**6})
        assert (answer.status_code, answer.json()["error"]["message"]) == (504, "not done in 0.5 s")
        with pytest.raises(openai.APIError, match=r"not done in 0\.5 s"):
            list(served.complete(**{**ENDLESS, "max_tokens": 10**6}, stream=True))
        eventually(lambda: served.scheduler.status()["running"] == 0)


def test_a_body_may_be_so_long(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, max_body_bytes=1000) as served:
        answer = served.post(content=b'{"prompt": "' + b"x" * 3_000_000)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "a body of 3000012 bytes: at most 1000 are read here"


def test_a_signal_ends_answers_and_refuses_new_ones(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny) as served:
        parts = iter(served.complete(**{**ENDLESS, "max_tokens": 400}, stream=True))
        next(parts)
        served.server.handle_exit(signal.SIGINT, None)
        with pytest.raises(openai.InternalServerError, match="the server is closing and takes no more requests"):
            served.complete("line")
        assert [*parts][-1].choices[0].finish_reason == "length"
        eventually(lambda: not served.scheduler._thread.is_alive())


def test_a_second_signal_breaks_answers_off(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, max_new_tokens=10**6) as served, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, json={**ENDLESS, "max_tokens": 10**6})
        eventually(lambda: served.scheduler.status()["running"] == 1)
        served.server.handle_exit(signal.SIGINT, None)
        served.server.handle_exit(signal.SIGINT, None)
        assert answer.result().status_code == 503
        assert "stopped" in answer.result().json()["error"]["message"]


def test_logits_that_are_not_finite_end_what_runs_and_not_the_server(serve: Any, lively_model: Build) -> None:
    model = lively_model("model.depth=1", vocab_size=257)
    with serve(model) as served:
        wanted = served.complete("line", max_tokens=3, seed=1).choices
        weight = model.head.weight.data.clone()
        model.head.weight.data.fill_(math.nan)
        answer = served.post(json={"prompt": "another", "max_tokens": 3})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"].startswith("the model's logits are not finite")
        model.head.weight.data.copy_(weight)
        assert served.complete("line", max_tokens=3, seed=1).choices == wanted


WRONG: list[tuple[Any, str]] = [
    (b"\xff", "the body is not JSON"),
    (b"[" * 100_000, "the body is not JSON"),
    ([], "the body must be an object, got []"),
    ({"temprature": 1}, "there is no parameter 'temprature' here; did you mean temperature?"),
    ({"temperature": "hot"}, "temperature: wanted a number, got 'hot'"),
    ({"temperature": True}, "temperature: wanted a number, got True"),
    ({"temperature": -1}, "temperature must be at least 0, got -1"),
    (b'{"temperature": NaN}', "temperature must be a finite number, got nan"),
    ({"top_p": 2}, "top_p must be above 0 and at most 1, got 2"),
    ({"frequency_penalty": 3}, "frequency_penalty must be at least -2 and at most 2, got 3"),
    ({"n": 0}, "n: at least 1 and at most 64 run at once here, got 1 prompts of 0 continuations"),
    ({"n": 2.0}, "n: wanted a whole number, got 2.0"),
    ({"n": 65}, "n: at least 1 and at most 64 run at once here, got 1 prompts of 65 continuations"),
    (
        {"prompt": ["a"] * 40, "n": 2},
        "n: at least 1 and at most 64 run at once here, got 40 prompts of 2 continuations",
    ),
    ({"max_tokens": 0}, "max_tokens must be at least 1 and at most 1000, got 0"),
    ({"max_tokens": 1001}, "max_tokens must be at least 1 and at most 1000, got 1001"),
    ({"prompt": []}, "prompt: the list is empty"),
    ({"prompt": [1, "a"]}, "prompt: wanted text, a list of texts, or token ids, got 1"),
    ({"prompt": [257]}, "prompt: there is no token 257, the ids are 0 to 256"),
    ({"prompt": "x" * 5001}, "a prompt of 5001 tokens: at most 5000 are read here"),
    ({"prompt": ["a", "\ud800"]}, "prompt 2: "),
    ({"stop": ""}, "stop must not be empty"),
    ({"stop": ["a", 1]}, "stop: wanted text or a list of at most 16 texts, got ['a', 1]"),
    ({"logprobs": 21}, "logprobs must be at least 0 and at most 20, got 21"),
    ({"logprobs": 1, "echo": True}, "logprobs are of the continuation alone: leave out echo"),
    ({"logit_bias": {"a": 1}}, "logit_bias: a token's id must be a whole number from 0 on, got 'a'"),
    ({"logit_bias": {"300": 1}}, "logit_bias: there is no token 300, the ids are 0 to 256"),
    ({"seed": 2**64}, "seed must be within 64 bits"),
    ({"suffix": "x"}, "there is no parameter 'suffix' here"),
]


def test_a_mistake_is_answered_400_in_one_line(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, max_body_bytes=200_000) as served:
        for asked, message in WRONG:
            content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
            answer = served.post(content=content)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), asked
            assert error["message"].startswith(message), asked
            assert "\n" not in error["message"]
        with pytest.raises(openai.NotFoundError, match="'another' is not served here, 'tiny' is"):
            served.client.completions.create(model="another", prompt="x")
        assert served.post("/nope").json()["error"]["message"] == "POST /nope: not found"
        assert served.http.get(f"{served.url}/v1/completions").status_code == 405
        assert served.scheduler.status()["tokens"] == 0


def test_models_are_listed(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny) as served:
        assert [model.id for model in served.client.models.list()] == ["tiny"]
        assert served.client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError):
            served.client.models.retrieve("another")


TEMPLATE = """{% for message in messages %}
<{{ message.role }}>{{ message.content | trim }}
{% if loop.last and message.role == 'assistant' %}{{ raise_exception('the last word is the user\\'s') }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_messages_are_answered_where_the_tokenizer_has_a_template(serve: Any, tiny: PerformerLM) -> None:
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


def test_sources_of_an_encoder_decoder_are_answered(serve: Any, model_section: Callable[..., dict[str, Any]]) -> None:
    small = ["model.dim=32", "model.encoder.heads=4", "model.decoder.heads=4", "attn=flash"]
    model: Any = checkpoint.build(model_section("model=performer_seq2seq", *small, vocab_size=257, tiny=[])).double()
    torch.nn.init.normal_(model.eval().head.weight)
    requests = [{"prompt": "word " * count, "seed": count, "max_tokens": 5} for count in (1, 9, 3, 3)]
    with serve(model) as served:
        for request, texts in zip(requests, ask_all(served, requests), strict=True):
            assert texts == [rows_of(model, **request)[0].text]


def test_no_thread_is_left(serve: Any, tiny: PerformerLM) -> None:
    before = threading.active_count()
    with serve(tiny) as served:
        served.complete("line", max_tokens=1)
    eventually(lambda: threading.active_count() <= before)
