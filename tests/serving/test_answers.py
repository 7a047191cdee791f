"""Every answer of the server is the one that generation gives."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
RowsOf = Callable[..., list[Row]]
BYTES = ByteTokenizer()
ASCII = {"banned_tokens": [*range(128, 256)]}
HYBRID = ["attn=hybrid", "attn.pattern=[favor,flash]", "model.token_shift=true"]


def text_of(chunks: Any) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


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


def test_tokens_log_probabilities_endings_and_counts_are_those_of_generation(
    serve: Any, tiny: PerformerLM, rows_of: RowsOf
) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "seed": 5, "n": 3}
    texts = [row.text for row in rows_of(tiny, "line", **options, **ASCII)]
    stop = [next(letter for letter in texts[0] if letter not in texts[1])]
    wanted = rows_of(tiny, "line", stop=stop, **options, **ASCII)
    with serve(tiny) as served:
        answer = served.complete("line", stop=stop, logprobs=2, **options, **ASCII)
    assert {choice.finish_reason for choice in answer.choices} == {"stop", "length"}
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == sum(len(row.tokens) for row in wanted)
    for choice, row in zip(answer.choices, wanted, strict=True):
        assert choice.finish_reason == {"end": "stop"}.get(row.ending, row.ending)
        assert choice.logprobs.tokens == [chr(token) if token < 256 else "<|end|>" for token in row.tokens]
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


def test_prompts_may_be_texts_or_ids_many_or_none_and_are_given_back(
    serve: Any, tiny: PerformerLM, rows_of: RowsOf
) -> None:
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


def test_the_default_of_a_parameter_is_that_of_openai(serve: Any, tiny: PerformerLM, rows_of: RowsOf) -> None:
    with serve(tiny) as served:
        assert served.complete("line", seed=0).choices[0].text == rows_of(tiny, "line", max_tokens=16)[0].text
        whole = served.post(json={"prompt": "line", "seed": 0, "top_p": None, "stop": None, "n": None}).json()
        assert whole["choices"][0]["text"] == rows_of(tiny, "line", max_tokens=16)[0].text


@pytest.mark.parametrize(
    "words", [["attn=favor"], ["attn=local", "attn.window=5", "attn.sinks=1"], ["attn=exact"]], ids=" ".join
)
def test_a_prefix_seen_is_read_no_more_and_answers_stay(
    serve: Any, lively_model: Build, words: list[str], rows_of: RowsOf
) -> None:
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
    serve: Any, lively_model: Build, monkeypatch: pytest.MonkeyPatch, rows_of: RowsOf
) -> None:
    monkeypatch.setattr(scheduling, "READ_AT_ONCE", 8)
    model = lively_model(*HYBRID, vocab_size=257)
    requests = [{"prompt": "word " * count, "seed": count, "max_tokens": 5} for count in (1, 9, 30, 2, 1, 17)]
    with serve(model) as served:
        for _ in range(2):  # the second time from what was kept
            for request, texts in zip(requests, ask_all(served, requests), strict=True):
                assert texts == [rows_of(model, **request)[0].text]


def test_sources_of_an_encoder_decoder_are_answered(
    serve: Any, model_section: Callable[..., dict[str, Any]], rows_of: RowsOf
) -> None:
    small = ["model.dim=32", "model.encoder.heads=4", "model.decoder.heads=4", "attn=flash"]
    model: Any = checkpoint.build(model_section("model=performer_seq2seq", *small, vocab_size=257, tiny=[])).double()
    torch.nn.init.normal_(model.eval().head.weight)
    requests = [{"prompt": "word " * count, "seed": count, "max_tokens": 5} for count in (1, 9, 3, 3)]
    with serve(model) as served:
        for request, texts in zip(requests, ask_all(served, requests), strict=True):
            assert texts == [rows_of(model, **request)[0].text]
