from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from performer_lm.attention.base import fork, select_rows
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.batch import complete
from performer_lm.generation.beams import search_beams
from performer_lm.generation.decode import decode, pad_left, read
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.session import Session, stream_text
from performer_lm.generation.text import Row
from performer_lm.model import PerformerLM

Build = Callable[..., PerformerLM]
BYTES = ByteTokenizer()
PROMPTS = ["line 1", "", "a much longer prompt", "é", "line 2"]
ASCII = Sampler(top_k=5, banned_tokens=range(128, 256))
CASES = [
    (["attn=favor", "model.depth=1"], Sampler(temperature=0, no_repeat_ngram_size=2)),
    (["attn=hybrid", "attn.pattern=[delta,flash]"], Sampler(top_k=50, top_p=0.95, repetition_penalty=1.3)),
    (["attn=local", "model.token_shift=true", "model.depth=1"], Sampler(min_p=0.01, typical_p=0.9)),
    (["model=transformer", "attn=exact"], Sampler(temperature=1.5, frequency_penalty=0.3, logit_bias={97: 3.0})),
]


def told(rows: Iterator[list[Row]]) -> list[tuple[str, list[int], str | None]]:
    return [(row.text, row.tokens, row.ending) for made in rows for row in made]


@pytest.mark.parametrize(("options", "sampler"), CASES)
def test_row_i_of_a_batch_is_single_run_i(lively_model: Build, options: list[str], sampler: Sampler) -> None:
    model = lively_model(*options, vocab_size=257)
    made = complete(model, BYTES, PROMPTS[:3], max_new_tokens=4, sampler=sampler, seed=3, num_samples=2)
    for prompt, rows in zip(PROMPTS[:3], made, strict=True):
        for seed, row in enumerate(rows, 3):
            alone = stream_text(model, BYTES, prompt, max_new_tokens=4, sampler=sampler, seed=seed)
            assert "".join(alone) == row.text


def test_the_size_of_batches_changes_nothing(lively_model: Build) -> None:
    model = lively_model("model.depth=1", vocab_size=257)
    made = [
        told(complete(model, BYTES, PROMPTS, max_new_tokens=4, sampler=Sampler(), batch_size=size))
        for size in (1, 2, 5)
    ]
    assert made[0] == made[1] == made[2]


def test_rows_stop_each_by_itself(lively_model: Build) -> None:
    model = lively_model("model.depth=1", vocab_size=257)
    free = told(complete(model, BYTES, PROMPTS, max_new_tokens=8, sampler=ASCII))
    stop = [free[0][0][2:4], free[2][0][1:2]]
    rows = told(complete(model, BYTES, PROMPTS, max_new_tokens=8, sampler=ASCII, stop=stop))
    assert {ending for _, _, ending in rows} > {"stop"}
    for (text, tokens, ending), (whole, all_tokens, _) in zip(rows, free, strict=True):
        assert not any(each in text for each in stop)
        assert whole.startswith(text)
        assert tokens == all_tokens[: len(tokens)]
        assert (ending == "stop") == any(each in whole for each in stop)


def test_log_probabilities_are_those_of_the_model_alone(lively_model: Build) -> None:
    model = lively_model("model.depth=1", vocab_size=257)
    sampler = Sampler(temperature=0.5, top_k=3, repetition_penalty=2.0, banned_tokens=[5])
    for prompt, [row] in zip(PROMPTS, complete(model, BYTES, PROMPTS, max_new_tokens=6, sampler=sampler), strict=True):
        ids = torch.tensor([[*(prompt.encode() or [256]), *row.tokens]])
        with torch.no_grad():
            wanted = model(ids)[0].log_softmax(-1)[-len(row.tokens) - 1 : -1].gather(1, ids[:, -len(row.tokens) :].mT)
        torch.testing.assert_close(torch.tensor(row.log_probs).double(), wanted[:, 0], atol=1e-5, rtol=1e-5)
        assert row.likelihood == pytest.approx(float(wanted.mean()), abs=1e-5)


def test_the_best_of_n_are_the_likeliest_of_n(lively_model: Build) -> None:
    model = lively_model("model.depth=1", vocab_size=257)
    options = {"max_new_tokens": 5, "sampler": Sampler(), "seed": 7}
    drawn = list(complete(model, BYTES, PROMPTS[:2], num_samples=6, **options))
    best = list(complete(model, BYTES, PROMPTS[:2], num_samples=2, best_of=6, **options))
    for rows, kept in zip(drawn, best, strict=True):
        wanted = sorted(rows, key=lambda row: row.likelihood, reverse=True)[:2]
        assert [row.tokens for row in kept] == [row.tokens for row in wanted]
    with pytest.raises(ValueError, match=r"best_of \(2\) must be at least num_samples \(3\)"):
        complete(model, BYTES, PROMPTS, num_samples=3, best_of=2, **options)  # type: ignore[arg-type]


def test_prompts_go_on_from_one_prefix_which_stays(lively_model: Build) -> None:
    model = lively_model("model.token_shift=true", vocab_size=257)
    prefix = read(model, torch.tensor([list(b"the beginning, ")]))
    prompts = ["line 1", "line 2", "", "x", "line 3"]
    options: dict[str, Any] = {"max_new_tokens": 4}
    options["sampler"] = Sampler(repetition_penalty=1.5, no_repeat_ngram_size=2)
    kept = fork(prefix)
    for _ in range(2):
        rows = told(complete(model, BYTES, prompts, after=prefix, **options))
        whole = [f"the beginning, {prompt}" for prompt in prompts]
        assert rows == told(complete(model, BYTES, whole, **options))
    assert torch.equal(kept.logits, prefix.logits)


def test_a_session_goes_on_as_one_text_does(lively_model: Build) -> None:
    model = lively_model("attn=hybrid", "attn.pattern=[favor,flash]", vocab_size=257)
    greedy = {"max_new_tokens": 4, "sampler": Sampler(temperature=0, no_repeat_ngram_size=3)}
    session = Session(model, BYTES, seed=0, **greedy)  # type: ignore[arg-type]
    text: list[int] = []
    for turn in ("one ", "", "two "):
        session.read(turn)
        made = "".join(session.write())
        prompt = torch.tensor([[*text, *turn.encode()]])
        wanted = torch.cat(list(decode(model, prompt, end_id=BYTES.end_id, **greedy))).tolist()  # type: ignore[arg-type]
        assert made == BYTES.decode(wanted)
        text = [*prompt[0].tolist(), *wanted]


def test_a_turn_broken_off_is_gone_on_from(lively_model: Build) -> None:
    model = lively_model("model.depth=1", vocab_size=257)
    greedy = {"max_new_tokens": 6, "sampler": Sampler(temperature=0), "seed": 0}
    whole = "".join(stream_text(model, BYTES, "line", **greedy))  # type: ignore[arg-type]
    session = Session(model, BYTES, **greedy)  # type: ignore[arg-type]
    session.read("line")
    begun = session.write()
    first = next(begun) + next(begun)
    begun.close()
    session.read()
    assert (first + "".join(session.write()))[: len(whole)] == whole


def test_a_session_goes_on_from_a_row_of_a_batch_without_its_padding(lively_model: Build) -> None:
    model, prompts = lively_model(vocab_size=257), [b"a longer prompt", b"short"]
    options = {"max_new_tokens": 4, "sampler": Sampler(temperature=0, no_repeat_ngram_size=1)}
    tokens, mask = pad_left([list(prompt) for prompt in prompts], device=torch.device("cpu"))
    batch = read(model, tokens, mask=mask)
    for index, prompt in enumerate(prompts):
        session, alone = (Session(model, BYTES, seed=0, **options) for _ in range(2))  # type: ignore[arg-type]
        session.resume(select_rows(batch, torch.tensor([index])))
        alone.read(prompt.decode())
        for _ in range(2):
            assert "".join(session.write()) == "".join(alone.write())
            assert session.text == alone.text
            assert session.text.encode().startswith(prompt)
            session.read(), alone.read()
    for go_on in (
        Session(model, BYTES, seed=0, **options).resume,  # type: ignore[arg-type]
        lambda after: complete(model, BYTES, ["a"], after=after, **options),  # type: ignore[arg-type]
        lambda prefix: search_beams(model, prefix, beams=2, end_id=0, **options),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="one row goes on, and this state holds 2"):
            go_on(batch)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", "\udcff"], {}, "prompt 2: text cannot be written as UTF-8"),
        (["\udcff"], {}, "^text cannot be written as UTF-8"),
        (["a"], {"stop": [""]}, "stop must not be empty"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (["a"], {"num_samples": 0}, "num_samples must be at least 1"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1"),
        (["a"], {"sampler": Sampler(banned_tokens=[257])}, "there is no token 257"),
        (["a", "b" * 9], {"max_new_tokens": 5}, r"must be at most 2 after a prompt of 9 tokens"),
    ],
)
def test_mistakes_are_refused_before_the_first_token(
    lively_model: Build, prompts: list[str], options: dict[str, object], message: str
) -> None:
    model = lively_model("model/absolute=learned", "model.absolute.max_len=10", vocab_size=257)
    with pytest.raises(ValueError, match=message):
        complete(model, BYTES, prompts, **{"max_new_tokens": 1, "sampler": Sampler(), **options})  # type: ignore[arg-type]
