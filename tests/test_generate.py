"""`generate.py` as it is typed, on a checkpoint of a tiny model in which every weight does something."""

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM

ROOT = Path(__file__).parents[1]
Generate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def generate(
    invoke: Callable[..., tuple[int, str, str]],
    lively_model: Callable[..., PerformerLM],
    model_section: Callable[..., dict[str, object]],
) -> Generate:
    """Return a function that runs `generate.py ckpt=a.ckpt max_new_tokens=8` with more words."""
    for name, attn in (("a", "favor"), ("b", "exact")):
        section, model = model_section(f"attn={attn}", vocab_size=257), lively_model(f"attn={attn}", vocab_size=257)
        own = checkpoint.describe(model=section, tokenizer=ByteTokenizer(), fingerprint={}, seed=0)
        weights = {
            f"model.{key}": value.float() for key, value in model.state_dict().items() if value.is_floating_point()
        }
        weights |= {f"model.{k}": value for k, value in model.state_dict().items() if not value.is_floating_point()}
        checkpoint.save({"performer_lm": own, "state_dict": weights}, Path(f"{name}.ckpt"))

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
