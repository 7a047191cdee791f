import itertools
from collections.abc import Callable

import pytest
import torch

from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.batch import complete
from performer_lm.generation.beams import search_beams
from performer_lm.generation.decode import read
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM

Build = Callable[..., PerformerLM]
END = 2


def every_row(length: int) -> list[list[int]]:
    """Return all rows of three tokens that end, or have so many."""
    rows = [[*begun, END] for size in range(length) for begun in itertools.product((0, 1), repeat=size)]
    return rows + [list(row) for row in itertools.product((0, 1), repeat=length)]


@pytest.mark.parametrize("attn", ["favor", "flash", "local"])
def test_enough_beams_are_an_exhaustive_search(lively_model: Build, attn: str) -> None:
    model = lively_model(f"attn={attn}", "model.token_shift=true", vocab_size=3)
    prompt = torch.tensor([[0, 1, 1, 0]])
    scored = []
    for row in every_row(4):
        with torch.no_grad():
            log_probs = model(torch.tensor([[*prompt[0].tolist(), *row]]))[0, 3:-1].log_softmax(-1)
        scored.append((float(log_probs[range(len(row)), row].sum()), row))
    scored.sort(reverse=True)
    options = {"max_new_tokens": 4, "sampler": Sampler(), "end_id": END}
    prefix = read(model, prompt)
    found = search_beams(model, prefix, beams=40, wanted=len(scored), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found.scores[: len(scored)], torch.tensor([score for score, _ in scored]).double())
    assert found.scores[len(scored) :].isinf().all()
    for tokens, log_probs, (score, row) in zip(found.tokens.tolist(), found.log_probs, scored, strict=False):
        assert tokens == row + [END] * (4 - len(row))
        assert float(log_probs.sum()) == pytest.approx(score, abs=1e-5)
    best = search_beams(model, prefix, beams=40, **options)  # type: ignore[arg-type]
    assert best.tokens[0].tolist() == scored[0][1][: best.tokens.shape[1]]


def test_one_beam_is_greedy_rules_and_end_included(lively_model: Build) -> None:
    model, tokenizer = lively_model(vocab_size=257), ByteTokenizer()
    sampler = Sampler(temperature=0, no_repeat_ngram_size=1, banned_tokens=[97], logit_bias={98: 2.0, 256: 1.0})
    prompts = ["a", "", "line 1"]
    greedy = complete(model, tokenizer, prompts, max_new_tokens=6, sampler=sampler)
    beams = complete(model, tokenizer, prompts, max_new_tokens=6, sampler=sampler, beams=1)
    for [row], [other] in zip(greedy, beams, strict=True):
        assert (row.tokens, row.text, row.ending) == (other.tokens, other.text, other.ending)
        assert row.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_beams_come_likeliest_first_each_once(lively_model: Build) -> None:
    model, tokenizer = lively_model("model.depth=1", vocab_size=257), ByteTokenizer()
    for length, wanted, there in ((4, 5, 5), (1, 300, 257)):
        [rows] = complete(
            model, tokenizer, ["line"], beams=wanted, num_samples=wanted, max_new_tokens=length, sampler=Sampler()
        )
        sums = [sum(row.log_probs) for row in rows]
        assert sums == sorted(sums, reverse=True)
        assert len({tuple(row.tokens) for row in rows}) == len(rows) == there
