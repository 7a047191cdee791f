"""lm-evaluation-harness on local tasks, offline: its numbers are those of our own code."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.batch import complete
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from performer_lm.evaluation.harness import HarnessModel  # noqa: E402

TASKS = Path(__file__).parent / "harness"
Lively = Callable[..., PerformerLM]


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a local task, and returns its numbers and samples."""
    import datasets
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASKS)  # the files of a task are named from there
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # runs programs for seconds

    def run(model: Any, task: str) -> dict[str, Any]:
        tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
        found: Any = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=tasks, bootstrap_iters=0)
        return {**found["results"][task], "samples": found["samples"][task]}

    return run


@pytest.fixture(scope="module")
def parts(lively_model: Lively) -> tuple[PerformerLM, ByteTokenizer]:
    tokenizer = ByteTokenizer()
    return lively_model("attn=favor", vocab_size=tokenizer.vocab_size), tokenizer


def log_likelihood(model: PerformerLM, ids: list[int], count: int) -> tuple[float, bool]:
    """Return the log-likelihood of the last `count` ids after the others, and whether each is the likeliest."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids[:-1]]))[0, -count:].log_softmax(-1)
    wanted = torch.tensor(ids[-count:])
    return float(log_probs.gather(1, wanted[:, None]).sum()), bool((log_probs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_choices_are_ranked_as_our_own_forward_ranks_them(evaluate: Any, parts: Any, batch_size: int) -> None:
    model, tokenizer = parts
    found = evaluate(HarnessModel(model, tokenizer, batch_size=batch_size), "local_choices")
    right = 0
    for row, sample in zip(rows_of("choices"), found["samples"], strict=True):
        context, expected = tokenizer.encode(row["question"]).tolist(), []
        for choice in row["choices"]:
            more = tokenizer.encode(" " + choice).tolist()  # the harness's own delimiter
            expected.append(log_likelihood(model, context + more, len(more)))
        told = [(float(answer[0][0]), answer[0][1]) for answer in sample["resps"]]
        assert [value for value, _ in told] == pytest.approx([value for value, _ in expected], rel=1e-9)
        likeliest = max(range(len(expected)), key=lambda index: expected[index][0])
        right += likeliest == row["answer"]
    assert found["acc,none"] == right / len(rows_of("choices"))


def test_rolling_texts_cost_what_they_cost_as_documents(evaluate: Any, parts: Any) -> None:
    model, tokenizer = parts
    found = evaluate(HarnessModel(model, tokenizer), "local_texts")
    texts = [row["text"] for row in rows_of("texts")]
    ids = [[tokenizer.end_id, *tokenizer.encode(text).tolist()] for text in texts]
    nats = -sum(log_likelihood(model, each, len(each) - 1)[0] for each in ids)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-9)


def test_continuations_are_those_of_our_own_engine(evaluate: Any, parts: Any) -> None:
    model, tokenizer = parts
    found = evaluate(HarnessModel(model, tokenizer, batch_size=2), "local_words")
    options: Any = {"max_new_tokens": 12, "sampler": Sampler(temperature=0), "stop": ["\n", "e"]}
    for row, sample in zip(rows_of("words"), found["samples"], strict=True):
        [[own]] = complete(model, tokenizer, [row["prompt"]], **options)
        assert sample["resps"][0][0] == own.text
    assert found["exact_match,none"] == 0


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=arguments)]


def test_a_likelihood_tells_whether_the_text_is_the_greedy_one(parts: Any) -> None:
    model, tokenizer = parts
    harness = HarnessModel(model, tokenizer, batch_size=2)
    ids = [tokenizer.end_id, *tokenizer.encode("abc").tolist()]
    rows = [(ids, 3), (ids[:2], 1), (ids, 1)]
    for _ in range(3):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
        rows += [(ids, 1), ([*ids[:-1], 0], 1)]
    rows += [(ids, 3)]
    found = harness._score(rows)
    expected = [log_likelihood(model, *row) for row in rows]
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert {is_greedy for _, is_greedy in found} == {True, False}
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-9)
    assert harness.loglikelihood(asked("", "abc"), disable_tqdm=True)[0] == pytest.approx(expected[0])
    assert harness.loglikelihood_rolling(asked(""))[0] == 0


def test_options_of_a_task_that_the_sampler_does_not_have_are_one_line(parts: Any) -> None:
    harness = HarnessModel(*parts)
    with pytest.raises(ValueError, match=r"^generation_kwargs\.num_beams: unknown; taken are until"):
        harness.generate_until(asked("abc", {"num_beams": 3}))
    assert harness._options({"until": "x", "do_sample": True, "temperature": 0.5})["sampler"].temperature == 0.5
    assert harness._options({"temperature": 0.5, "do_sample": False})["sampler"].temperature == 0
    assert harness._options({})["sampler"].temperature == 0


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, HarnessModel.__module__)
    with pytest.raises(ModuleNotFoundError, match=r"^performer_lm.evaluation.harness needs lm-evaluation-harness: pip"):
        importlib.import_module(HarnessModel.__module__)


def test_nothing_else_imports_the_package() -> None:
    root = Path(__file__).parents[2]
    naming = [
        path
        for path in (root / "performer_lm").rglob("*.py")
        if "import lm_eval" in (text := path.read_text()) or "from lm_eval" in text
    ]
    assert [path.name for path in naming] == ["harness.py"]


def test_a_model_that_does_not_write_is_one_line(model_section: Callable[..., dict[str, Any]]) -> None:
    model = checkpoint.build(model_section("model=performer_encoder", "objective=mlm"))
    with pytest.raises(ValueError, match=r"^lm-evaluation-harness is for models that predict each next token"):
        HarnessModel(model, ByteTokenizer())
