"""Refusals and endings of the server: one line each, in OpenAI's form."""

import json
import math
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from performer_lm.model import PerformerLM

Build = Callable[..., PerformerLM]
ENDLESS: dict[str, Any] = {"prompt": "line", "max_tokens": 1000, "banned_tokens": [256]}


def test_a_client_that_hangs_up_frees_its_rows(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, max_rows=2) as served:
        stream = served.complete(**ENDLESS, n=2, stream=True)
        next(iter(stream))
        assert served.scheduler.status()["running"] == 2
        stream.close()
        served.wait_until(lambda: served.scheduler.status()["running"] == 0)
        with pytest.raises(httpx.TimeoutException):
            served.post(json=ENDLESS, timeout=0.1)
        served.wait_until(lambda: served.scheduler.status()["running"] == 0)
        assert served.complete("line", max_tokens=2).usage.completion_tokens == 2


def test_more_than_may_wait_are_answered_429_in_one_line(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, max_rows=1, max_waiting=1) as served, ThreadPoolExecutor(2) as pool:
        running = pool.submit(served.post, json={**ENDLESS, "max_tokens": 200})
        served.wait_until(lambda: served.scheduler.status()["running"] == 1)
        waiting = pool.submit(served.post, json={**ENDLESS, "max_tokens": 3})
        served.wait_until(lambda: served.scheduler.status()["waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            served.complete("line")
        assert refused.value.body["message"] == "as many prompts wait as may (max_waiting=1): try again later"
        assert [each.result().status_code for each in (running, waiting)] == [200, 200]


def test_what_takes_too_long_is_answered_504_and_a_stream_tells_so(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, timeout=0.5, max_new_tokens=10**6) as served:
        answer = served.post(json={**ENDLESS, "max_tokens": 10**6})
        assert (answer.status_code, answer.json()["error"]["message"]) == (504, "not done in 0.5 s")
        with pytest.raises(openai.APIError, match=r"not done in 0\.5 s"):
            list(served.complete(**{**ENDLESS, "max_tokens": 10**6}, stream=True))
        served.wait_until(lambda: served.scheduler.status()["running"] == 0)


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
        served.wait_until(lambda: not served.scheduler._thread.is_alive())


def test_a_second_signal_breaks_answers_off(serve: Any, tiny: PerformerLM) -> None:
    with serve(tiny, max_new_tokens=10**6) as served, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, json={**ENDLESS, "max_tokens": 10**6})
        served.wait_until(lambda: served.scheduler.status()["running"] == 1)
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
    ({"n": 0}, "n: prompts x n must be at least 1 and at most 64 (max_rows), got 1 x 0"),
    ({"n": 2.0}, "n: wanted a whole number, got 2.0"),
    ({"n": 65}, "n: prompts x n must be at least 1 and at most 64 (max_rows), got 1 x 65"),
    (
        {"prompt": ["a"] * 40, "n": 2},
        "n: prompts x n must be at least 1 and at most 64 (max_rows), got 40 x 2",
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


def test_no_thread_is_left(serve: Any, tiny: PerformerLM) -> None:
    before = threading.active_count()
    with serve(tiny) as served:
        served.complete("line", max_tokens=1)
    served.wait_until(lambda: threading.active_count() <= before)
