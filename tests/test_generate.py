"""`generate.py` as it is typed, on a checkpoint of a tiny model in which every weight does something."""

import dataclasses
import json
import runpy
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM

ROOT = Path(__file__).parents[1]
Generate = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoints(
    lively_model: Callable[..., PerformerLM],
    model_section: Callable[..., dict[str, object]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the folder of `a.ckpt`, a model with random features, and `b.ckpt`, one with softmax."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, attn in (("a", "favor"), ("b", "exact")):
        section, model = model_section(f"attn={attn}", vocab_size=257), lively_model(f"attn={attn}", vocab_size=257)
        own = checkpoint.describe(model=section, tokenizer=ByteTokenizer(), fingerprint={}, seed=0)
        weights = {
            f"model.{key}": value.float() for key, value in model.state_dict().items() if value.is_floating_point()
        }
        weights |= {f"model.{k}": value for k, value in model.state_dict().items() if not value.is_floating_point()}
        checkpoint.save({"performer_lm": own, "state_dict": weights}, folder / f"{name}.ckpt")
    return folder


@pytest.fixture
def generate(invoke: Callable[..., tuple[int, str, str]], checkpoints: Path) -> Generate:
    """Return a function that runs `generate.py ckpt=a.ckpt max_new_tokens=8` with more words."""
    shutil.copytree(checkpoints, ".", dirs_exist_ok=True)

    def run(*words: str) -> tuple[int, str, str]:
        typed = {word.partition("=")[0] for word in words}
        usual = [word for word in ("ckpt=a.ckpt", "max_new_tokens=8") if word.partition("=")[0] not in typed]
        return invoke(*usual, *words, script="generate.py")

    return run


def test_every_option_of_the_sampler_is_a_key() -> None:
    keys = runpy.run_path(str(ROOT / "generate.py"))["SAMPLING"]
    assert set(keys) == {field.name for field in dataclasses.fields(Sampler)}


def test_options_typed_reach_the_draw(generate: Generate) -> None:
    banned = f"banned_tokens=[{','.join(str(token) for token in range(257) if token not in (97, 98))}]"
    code, out, err = generate(banned, "logit_bias={97:90}", "prompt=x", "top_p=0.9", "min_p=0.1", "typical_p=0.9")
    assert (code, out, err) == (0, "xaaaaaaaa\n", "")
    code, out, err = generate(banned, "no_repeat_ngram_size=2", "frequency_penalty=2", "max_new_tokens=4", "prompt=x")
    assert code == 0, err
    assert len({out[place : place + 2] for place in range(4)}) == 4  # of two letters no earlier dead end


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("min_p=nan", "min_p must be a finite number, got nan"),
        ("typical_p=0", "typical_p must be above 0 and at most 1, got 0"),
        ("presence_penalty=3", "presence_penalty must be at least -2 and at most 2, got 3"),
        ("no_repeat_ngram_size=0", "no_repeat_ngram_size must be at least 1, got 0"),
        ("banned_tokens=[a]", "banned_tokens[0]: wanted int, got 'a' (str)"),
        ("banned_tokens=[257]", "banned_tokens: there is no token 257, the ids are 0 to 256"),
        ("logit_bias={a:1}", "logit_bias: a token's id must be a whole number from 0 on, got 'a'"),
        ("logit_bias={1:x}", "logit_bias.1: wanted float, got 'x' (str)"),
        ("logit_bias={1:1e9}", "logit_bias[1] must be at least -100 and at most 100, got 1000000000.0"),
        ("logit_bias=[1]", "logit_bias: wanted a section of float or null, got [1] (list)"),
    ],
)
def test_a_mistake_is_one_line(generate: Generate, word: str, message: str) -> None:
    assert generate(word) == (2, "", f"error: {message}\n")


def lines_of(text: str) -> list[dict[str, Any]]:
    """Return the records of jsonl without their times."""
    records = [json.loads(line) for line in text.splitlines()]
    assert all(record.pop("seconds") >= 0 for record in records)
    return records


def test_prompts_of_a_file_come_out_as_jsonl_each_as_alone(generate: Generate) -> None:
    Path("my prompts.txt").write_text("line 1\nlonger line 2\né\n")
    Path("same.jsonl").write_text('{"text": "line 1", "id": 7}\n{"text": "longer line 2"}\n{"text": "\\u00e9"}\n')
    code, out, err = generate("prompts=my prompts.txt", "num_samples=2", "seed=3", "batch_size=2")
    assert (code, err) == (0, "")
    records = lines_of(out)
    assert [record["prompt"] for record in records] == ["line 1"] * 2 + ["longer line 2"] * 2 + ["é"] * 2
    assert all(len(record["tokens"]) == len(record["log_probs"]) == 8 for record in records)
    assert {record["ending"] for record in records} == {"length"}
    for index, record in enumerate(records):
        code, out, err = generate(f"prompt={record['prompt']}", f"seed={3 + index % 2}")
        assert out == f"{record['prompt']}{record['text']}\n"
    code, out, err = generate("prompts=same.jsonl", "num_samples=2", "seed=3", "out=a folder.jsonl")
    assert (code, out, err) == (0, "", "")
    for record, other in zip(records, lines_of(Path("a folder.jsonl").read_text()), strict=True):
        assert record.pop("log_probs") == pytest.approx(other.pop("log_probs"), abs=1e-4)
        assert record == other


def test_the_best_of_some_and_stop_strings_come_out(generate: Generate) -> None:
    drawn = lines_of(generate("prompt=x", "num_samples=4", "banned_tokens=null")[1])
    [best] = lines_of(generate("prompt=x", "best_of=4")[1])
    assert best == max(drawn, key=lambda record: statistics.fmean(record["log_probs"]))
    ascii_only = f"banned_tokens={[*range(128, 256)]}".replace(" ", "")
    [whole] = lines_of(generate("prompt=x", ascii_only, "out=a.jsonl")[1] or Path("a.jsonl").read_text())
    code, out, _ = generate("prompt=x", ascii_only, f"stop={whole['text'][3:5]}")
    assert (code, out) == (0, f"x{whole['text'].partition(whole['text'][3:5])[0]}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', """line 2 has no text, as {"text": "..."} has: '{"txt": "b"}'"""),
        ('{"text": 3}\n', """line 1 has no text, as {"text": "..."} has: '{"text": 3}'"""),
        ('{"text": "a"}\n\n', "line 2 is not JSON: ''"),
        ('["a"]', """line 1 has no text, as {"text": "..."} has: '["a"]'"""),
        ('{"text": "a"}\n{"text": \n', """line 2 is not JSON: '{"text": '"""),
        ("[" * 100_000, "line 1 is not JSON: '" + "[" * 28 + "..." + "[" * 28 + "'"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8: byte 0xff"),
    ],
)
@pytest.mark.parametrize("out", [[], ["out=b.jsonl"]])
def test_a_line_without_text_is_told_by_its_number_and_nothing_is_written(
    generate: Generate, content: str | bytes, message: str, out: list[str]
) -> None:
    Path("a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = set(Path().iterdir())
    code, said, err = generate("prompts=a.jsonl", *out)
    assert (code, said) == (2, "")
    assert err.startswith(f"error: a.jsonl: {message}"[:90])
    assert len(err.splitlines()) == 1
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompts=none.txt"], "none.txt: no such file or directory"),
        (["prompts=empty.txt"], "empty.txt holds no prompts"),
        (["prompts=gap.txt"], """gap.txt: line 2 is empty; in a .jsonl file {"text": ""} begins a document"""),
        (["prompts=odd.jsonl"], "prompt 2: text cannot be written as UTF-8: '\\ud800' at character 0"),
        (["prompts=gap.txt", "prompt=a"], "prompts and prompt both say what to continue: give one of them"),
        (["stop="], "stop must not be empty: an empty string stands before every text"),
        (["num_samples=0"], "num_samples must be at least 1, got 0"),
        (["best_of=2", "num_samples=3"], "best_of (2) must be at least num_samples (3)"),
        (
            ["interactive=true", "beams=2"],
            "interactive is of one text: it goes with none of prompts, out, num_samples, best_of, beams",
        ),
        (["interactive=true", "prompt=-"], "interactive reads turns from standard input, which prompt=- reads to"),
        (["beams=2", "num_samples=3"], "beams (2) must be at least num_samples (3)"),
        (["beams=2", "best_of=3"], "beams are searched for and best_of are drawn: give one of them"),
        (["out=none/b.jsonl"], "none/b.jsonl: cannot be written (no such file or directory)"),
        (["save_state=none/b.state"], "none/b.state: cannot be written (no such file or directory)"),
        (["state=none.state"], "none.state: no such file or directory"),
        (["state=a.ckpt"], "a.ckpt is no state of performer_lm, or is cut short (Error while deserializing header"),
        (
            ["save_state=a.state", "num_samples=2"],
            "save_state is of one text: it goes with none of prompts, out, num_samples, best_of, beams",
        ),
    ],
)
def test_mistakes_with_files_are_one_line_and_leave_nothing(generate: Generate, words: list[str], message: str) -> None:
    Path("empty.txt").touch()
    Path("gap.txt").write_text("a\n\nb\n")
    Path("odd.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    before = set(Path().iterdir())
    code, out, err = generate(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1
    assert set(Path().iterdir()) == before


def test_a_saved_state_goes_on_as_the_text_does_and_not_in_another_model(generate: Generate) -> None:
    rules = ["temperature=0", "repetition_penalty=1.5", "no_repeat_ngram_size=2"]
    code, _, err = generate("prompt=the beginning", "save_state=my state", *rules)
    assert (code, err) == (0, "")
    for prompt in ("", " of it"):
        code, out, err = generate("state=my state", f"prompt={prompt}", *rules)
        assert (code, err) == (0, "")
        assert f"the beginning{out}" == generate(f"prompt=the beginning{prompt}", *rules)[1]
    Path("ends.txt").write_text(" of it\n of all\n")
    forked = lines_of(generate("state=my state", "prompts=ends.txt", *rules)[1])
    for record in forked:
        assert generate(f"prompt=the beginning{record['prompt']}", *rules)[1].endswith(record["text"] + "\n")
    code, out, err = generate("state=my state", "ckpt=b.ckpt")
    assert (code, out) == (2, "")
    assert err == "error: my state is a state of another model: its attention backend differs\n"


KEYS = [
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "repetition_window", "no_repeat_ngram_size", "banned_tokens", "logit_bias", "seed"),
    *(
        "num_samples",
        "best_of",
        "beams",
        "batch_size",
        "max_new_tokens",
        "stop",
        "prompt",
        "prompts",
        "state",
        "device",
    ),
]
VALUES = ["0", "1", "2", "5", "0.5", "-1", "1e-320", "1e39", "nan", "inf", "null", "abc", "[]", "[1]", "[1,1]", "{1:2}"]
VALUES += ["{1:-100}", "{a:1}", "[[1]]", "", "true", "9223372036854775807", "9223372036854775808", "${seed}", "ä ö"]


@given(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=3))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_is_typed_generates_or_is_refused_in_clear_lines(generate: Generate, typed: dict[str, str]) -> None:
    assume(not any(len(typed.get(key, "")) > 4 for key in ("max_new_tokens", "num_samples", "best_of", "beams")))
    code, out, err = generate(*(f"{key}={value}" for key, value in {"max_new_tokens": "3", **typed}.items()))
    assert code in (0, 2, 3), err
    told = err.splitlines()
    assert (code == 0) == (not told)
    assert all(line.startswith("error: ") and len(line) < 300 for line in told)
    assert code == 0 or not out
    assert "Traceback" not in err


def test_a_backend_that_the_checkpoint_has_keeps_its_own_options_but_for_those_typed(
    invoke: Callable[..., tuple[int, str, str]], model_section: Callable[..., dict[str, Any]]
) -> None:
    section = model_section("attn=favor", "attn/features=hyperbolic", "attn.num_features=24", vocab_size=257)
    own = checkpoint.describe(model=section, tokenizer=ByteTokenizer(), fingerprint={}, seed=7)
    model = checkpoint.build(section)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.3)
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    checkpoint.save({"performer_lm": own, "state_dict": weights}, Path("c.ckpt"))

    def write(*words: str) -> tuple[int, str, str]:
        return invoke("ckpt=c.ckpt", "prompt=some text", "max_new_tokens=16", *words, script="generate.py")

    as_trained = write()
    assert as_trained[0] == 0, as_trained[2]
    assert write("attn=favor") == as_trained
    assert write("attn=favor", "attn.num_features=24", "attn/features=hyperbolic") == as_trained
    code, _, err = write("attn=favor", "attn.num_features=12")
    assert (code, err) == (0, "note: the attention backend changed: 0 of its tensors left out, 2 drawn anew\n")
