"""A model that was exported is the same model in transformers: its logits, its text, its tokenizer."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from math import log, prod
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra `hf`")

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from performer_lm import checkpoint
from performer_lm.data.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    LibraryTokenizer,
    SymbolTokenizer,
    Tokenizer,
    train_byte_pairs,
    train_unigram,
    train_word_pieces,
)
from performer_lm.generation.beams import search_beams
from performer_lm.generation.decode import decode, pad_left, read
from performer_lm.generation.sampling import Sampler
from performer_lm.interop.export import stand_ins
from performer_lm.interop.export.card import Training
from performer_lm.interop.export.folder import FILES, check_model, export
from performer_lm.interop.export.modeling import find_class
from performer_lm.model import PerformerLM

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*mark_static_address.*",
    "ignore:`torch.jit:DeprecationWarning",  # transformers imports what torch deprecates
)

ROOT = Path(__file__).parents[2]
Section = Callable[..., dict[str, Any]]
Invoke = Callable[..., tuple[int, str, str]]
BYTES = ByteTokenizer()
BACKENDS = sorted(path.stem for path in (ROOT / "configs/attn").glob("*.yaml"))
FEATURES = sorted(path.stem for path in (ROOT / "configs/attn/features").glob("*.yaml"))
CAUSAL_FEATURES = [name for name in FEATURES if name not in ("trig", "identity")]
PLAIN = ["model=transformer", "model.feed_forward.activation=silu", "model.feed_forward.gated=true"]
VARIANTS = {
    **{f"attn={name}": [f"attn={name}"] for name in BACKENDS},
    **{f"features={name}": ["attn=favor", f"attn/features={name}"] for name in CAUSAL_FEATURES},
    "averages": ["attn=favor", "attn/features=optimal", "attn.features.centred=true"],
    "delta with identity": ["attn=delta", "attn/features=identity", "attn.num_features=null"],
    "no extras": ["model.convolution=0", "model.decay=false", "model.gate=false"],
    "plain favor": ["model=transformer", "attn=favor"],
    "hybrid by layers": ["attn=hybrid", "attn.pattern=[delta,flash]", "model.token_shift=true"],
    "first tokens in sight": ["attn=local", "attn.window=4", "attn.sinks=2"],
    "local heads": ["model.local_heads=1", "model.key_heads=4", "model.qk_norm=8"],
    "local heads beside softmax": ["model.local_heads=[0,2]", "attn=flash"],
    "two streams, tied": ["model.reversible=true", "model.tie_embeddings=true", "model/norm=layer"],
    "learned positions": ["model/absolute=learned", "model.absolute.max_len=64", "model.head_bias=true"],
    "rezero": ["model/norm=none", "model.rezero=true", "model.out_bias=true"],
}
LLAMAS = {
    "untied": ["attn=flash"],
    "tied, grouped keys": ["attn=exact", "model.tie_embeddings=true", "model.key_heads=2"],
    "biases": ["attn=flash", "model.qkv_bias=true", "model.out_bias=true", "model.feed_forward.bias=true"],
    "other sizes": ["attn=chunked", "model.positions.base=50000", "model.dim_head=16", "+model.norm.eps=1e-5"],
    "by a pattern": ["attn=hybrid", "attn.pattern=[flash,exact]"],
}
NO_LLAMAS = {
    "one bias": ["attn=flash", "model.qkv_bias=true"],
    "a linear layer": ["attn=hybrid", "attn.pattern=[flash,favor]"],
    "part of the channels": ["attn=flash", "model.positions.width=4"],
    "other pairs": ["attn=flash", "model.positions.interleaved=true"],
    "two kinds of norm": ["attn=flash", "+model.final_norm={_target_:performer_lm.nn.norm.NoNorm,_partial_:true}"],
}


@pytest.fixture(autouse=True)
def _quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the modules that transformers copies in the test's own folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def exported(model_section: Section, tmp_path: Path) -> Callable[..., tuple[PerformerLM, Any]]:
    """Return a function from config overrides to a float32 model in which every weight does something, and its twin."""

    def build(*overrides: str, tokenizer: Tokenizer = BYTES) -> tuple[PerformerLM, Any]:
        section = model_section(*overrides, vocab_size=tokenizer.vocab_size)
        model = lively(section)
        export(model, tokenizer, section, tmp_path / "out", training=Training(7))
        return model, AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)

    return build


def lively(section: dict[str, Any]) -> PerformerLM:
    model: PerformerLM = checkpoint.build(section)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("mean_square"):
            buffer.fill_(0.75)  # as training leaves it
    return model.eval()


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


def greedy(model: PerformerLM, tokens: Tensor, mask: Tensor | None, count: int) -> Tensor:
    drawn = decode(model, tokens, mask=mask, max_new_tokens=count, sampler=Sampler(temperature=0))
    return torch.stack(list(drawn), dim=1)


def until_end(tokens: Tensor) -> list[int]:
    ids = tokens.tolist()
    return ids[: ids.index(256)] if 256 in ids else ids


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_an_export_gives_the_logits_and_the_text_of_the_model(name: str, exported: Any) -> None:
    model, twin = exported(*VARIANTS[name])
    assert type(twin).__module__.startswith("transformers_modules.")
    tokens, mask = pad_left(rows(9, 14), device=torch.device("cpu"))
    assert mask is not None
    expected = model(tokens, mask=mask)
    torch.testing.assert_close(twin(tokens, attention_mask=mask.long()).logits, expected, atol=1e-5, rtol=0)
    wanted = greedy(model, tokens, mask, 6)
    for use_cache in (True, False):
        found = twin.generate(
            tokens, attention_mask=mask.long(), max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=-1
        )
        assert torch.equal(found[:, tokens.shape[1] :], wanted), use_cache


@pytest.mark.parametrize(
    "name", ["attn=favor", "attn=delta", "hybrid by layers", "local heads", "first tokens in sight"]
)
@torch.inference_mode()
def test_beams_follow_the_streams_that_ours_follow(name: str, exported: Any) -> None:
    model, twin = exported(*VARIANTS[name])
    tokens = torch.tensor(rows(11, 11))
    found = twin.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **{"max_new_tokens": 5, "num_beams": 4, "length_penalty": 0.0, "do_sample": False, "eos_token_id": 256},
    )
    for row, own in zip(tokens, found, strict=True):
        prefix = read(model, row[None])
        best = search_beams(model, prefix, beams=4, max_new_tokens=5, sampler=Sampler(temperature=1), end_id=256)
        assert until_end(own[11:]) == until_end(best.tokens[0])


@pytest.mark.parametrize("name", ["attn=favor", "attn=local", "first tokens in sight", "attn=flash"])
@torch.inference_mode()
def test_a_cache_goes_on_in_any_parts_and_its_streams_can_be_picked_and_repeated(name: str, exported: Any) -> None:
    model, twin = exported(*VARIANTS[name])
    tokens = torch.tensor(rows(12, 12, 12))
    expected = model(tokens)
    cache = DynamicCache(config=twin.config)
    parts = [twin(tokens[:, :5], cache=cache).logits, twin(tokens[:, 5:6], cache=cache, logits_to_keep=1).logits]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, :6], atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 6
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert not cache.is_croppable
    picked = [2, 2, 0, 0]
    logits = twin(tokens[picked, 6:], cache=cache).logits
    torch.testing.assert_close(logits, expected[picked, 6:], atol=1e-5, rtol=0)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)
    cache.reset()
    torch.testing.assert_close(twin(tokens, cache=cache).logits, expected, atol=1e-5, rtol=0)


def test_an_export_trains_and_is_saved_with_its_code(exported: Any, tmp_path: Path) -> None:
    _, twin = exported("attn=favor", "attn/features=optimal")
    tokens = torch.tensor(rows(12, 12))
    loss = twin.train()(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(twin(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    twin.eval().save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(tokens).logits, twin(tokens).logits)


def test_an_export_opens_in_half_the_precision(exported: Any, tmp_path: Path) -> None:
    model, _ = exported("attn=favor", "attn/features=optimal")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="bfloat16")
    tokens = torch.tensor(rows(12))
    assert {buffer.dtype for name, buffer in twin.named_buffers() if "mean_square" in name} == {torch.float32}
    assert torch.equal(twin(tokens).logits, model.bfloat16()(tokens))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda twin, x: twin(inputs_embeds=torch.zeros(1, 3, 32)), "no inputs_embeds"),
        (lambda twin, x: twin(x, cache=StaticCache(config=twin.config, max_cache_len=8)), "not in a StaticCache"),
        (lambda twin, x: twin(x, attention_mask=torch.ones(1, 9)), "mask must be bool or integer"),
        (lambda twin, x: twin(x, attention_mask=torch.tensor([[1, 1, 0]]), use_cache=True), "pad on the left"),
        (lambda twin, x: find_class("performer_lm.building.build"), "no layer or model"),
        (lambda twin, x: find_class("os.system"), "no layer or model"),
    ],
)
def test_what_a_state_cannot_take_is_refused_in_one_line(exported: Any, call: Any, match: str) -> None:
    _, twin = exported()
    with pytest.raises(ValueError, match=match) as caught:
        call(twin, torch.tensor([[1, 2, 3]]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LLAMAS)
@torch.inference_mode()
def test_a_model_that_is_llama_by_another_name_needs_no_code(name: str, exported: Any, tmp_path: Path) -> None:
    model, twin = exported(*PLAIN, *LLAMAS[name])
    assert type(twin) is transformers.LlamaForCausalLM
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"modeling_performer.py"}
    tokens, mask = pad_left(rows(9, 14), device=torch.device("cpu"))
    assert mask is not None
    logits = twin(tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(logits[mask], model(tokens, mask=mask)[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NO_LLAMAS)
@torch.inference_mode()
def test_a_model_that_is_almost_llama_keeps_its_own_code(name: str, exported: Any) -> None:
    model, twin = exported(*PLAIN, *NO_LLAMAS[name])
    assert type(twin).__name__ == "PerformerForCausalLM"
    tokens = torch.tensor(rows(9))
    torch.testing.assert_close(twin(tokens).logits, model(tokens), atol=1e-5, rtol=0)


ALONE = """
import json, sys
sys.modules["einops"] = sys.modules["annotated_types"] = sys.modules["performer_lm"] = None  # not to be imported
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(text, return_tensors="pt")
logits = model(**inputs).logits[0, -1].tolist()
print(json.dumps([logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()]))
"""


@pytest.mark.slow  # a process of its own, which imports transformers
@pytest.mark.parametrize("name", ["attn=hybrid", "attn=delta"])
def test_an_export_opens_where_this_package_is_not(name: str, exported: Any, tmp_path: Path) -> None:
    model, _ = exported(*VARIANTS[name])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "out"), "some text"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits, tokens = json.loads(done.stdout.splitlines()[-1])
    prompt = torch.from_numpy(BYTES.encode("some text"))[None]
    with torch.inference_mode():
        torch.testing.assert_close(torch.tensor(logits), model(prompt)[0, -1], atol=1e-5, rtol=0)
    assert tokens == [*prompt[0].tolist(), *greedy(model, prompt, None, 5)[0].tolist()]


TEXTS = ["def main():\n    return 'é ☃ 𝄞'  # <|endoftext|>\n\n\tx", "", " a  b", "\x00\x7f ÿ\r\n"]
CORPUS = [text.encode() for text in TEXTS] * 3 + [b"a few more words of text, and some more words"] * 5


def library_file() -> LibraryTokenizer:
    """Return somebody's tokenizer.json, which would shorten texts and put marks around them."""
    made = train_byte_pairs(CORPUS, vocab_size=280)
    content = json.loads(made.library.to_str())
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    mark = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": "!", "type_id": 0}}
    content["post_processor"] = {
        **{"type": "TemplateProcessing", "single": [first, mark], "pair": [first, mark, mark]},
        "special_tokens": {"!": {"id": "!", "ids": [33], "tokens": ["!"]}},
    }
    return LibraryTokenizer(content=content, specials=["mask"])


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: ByteTokenizer(specials=["mask"]),
    "characters": lambda: CharacterTokenizer(alphabet="".join(sorted({*"".join(TEXTS)})), fallback=False),
    "characters or bytes": lambda: CharacterTokenizer(alphabet="aé☃", fallback=True, specials=["mask"]),
    "byte pairs": lambda: train_byte_pairs(CORPUS, vocab_size=300, specials=["mask", "sep"]),
    "unigram": lambda: train_unigram(CORPUS, vocab_size=300),
    "word pieces": lambda: train_word_pieces(CORPUS, vocab_size=560),
    "tokenizer.json": library_file,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_exported_tokenizer_gives_the_ids_and_the_text_of_ours(
    name: str, model_section: Section, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[name]()
    section = model_section("model.depth=1", vocab_size=tokenizer.vocab_size)
    export(checkpoint.build(section), tokenizer, section, tmp_path / "out", training=Training(7))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.end_id
    for special, token in tokenizer.specials.items():
        assert theirs.convert_tokens_to_ids(f"<|{special}|>") == token
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids) == tokenizer.decode(ids)
        assert theirs.decode([*ids, tokenizer.end_id], skip_special_tokens=True) == text
    assert all(theirs.decode([token]) == tokenizer.decode([token]) for token in range(min(tokenizer.end_id, 128)))


def test_names_of_a_made_up_language_are_exported_too(model_section: Section, tmp_path: Path) -> None:
    tokenizer = SymbolTokenizer(names=["k1", "v1", "?"])
    section = model_section("model.depth=1", vocab_size=tokenizer.vocab_size)
    export(checkpoint.build(section), tokenizer, section, tmp_path / "out", training=Training(7))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert theirs("? k1 v1").input_ids == [2, 0, 1]


def patterns() -> set[tuple[str, str]]:
    """Return each function of einops and each pattern that it is called with in the sources that are exported."""
    name = r"(?<!torch\.)\b(rearrange|repeat|einsum)\("
    calls = rf"{name}(?:(?!{name})[^\"'])*\"(\w[^\"]*->[^\"]*)\""
    found = set()
    for folder in ("ops", "attention", "nn"):
        for path in (ROOT / "performer_lm" / folder).rglob("*.py"):
            found |= {(name, pattern) for name, _, pattern in re.findall(calls, path.read_text())}
    return found


def drawn(side: str, sizes: dict[str, int]) -> Tensor:
    """Return a tensor whose axes are named, in a pattern's way."""
    groups = [inside.split() or [word] for inside, word in re.findall(r"\(([^)]*)\)|(\S+)", side)]
    shape = [prod(sizes.get(axis, 1) for axis in group) for group in groups if group != ["..."]]
    return torch.randn(*shape, *([3, 5] if "..." in side else []))


def test_the_stand_ins_do_what_einops_does_with_every_pattern_of_the_sources() -> None:
    assert len(patterns()) > 30
    for name, pattern in patterns():
        left, right = (set(re.findall(r"[a-z]+", side)) for side in pattern.split("->"))
        sizes = {axis: size for size, axis in enumerate(sorted(left | right), 2)}
        tensors = [drawn(side, sizes) for side in pattern.split("->")[0].split(",")]
        inside = {axis for group in re.findall(r"\(([^)]*)\)", pattern.split("->")[0]) for axis in group.split()}
        given = {} if name == "einsum" else {axis: sizes[axis] for axis in inside | (right - left)}
        expected = getattr(einops, name)(*tensors, pattern, **given)
        torch.testing.assert_close(getattr(stand_ins, name)(*tensors, pattern, **given), expected)


def test_the_stand_ins_refuse_what_does_not_fit() -> None:
    for pattern, sizes in (("(a b) -> a b", {"a": 4}), ("a b -> b a", {}), ("(a b) -> a b", {})):
        with pytest.raises(ValueError, match=r"axis|axes"):
            stand_ins.rearrange(torch.zeros(6), pattern, **sizes)


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["model=performer_encoder"], "an encoder"),
        (["model=performer_seq2seq", "model.encoder.depth=1"], "seq2seq"),
        (["attn=favor", "+model.cross_attend=true"], "cross-attention"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_name(
    overrides: list[str], kind: str, model_section: Section, tmp_path: Path
) -> None:
    tiny = [] if "model=performer_seq2seq" in overrides else ["model.dim=32", "model.depth=1", "model.heads=4"]
    section = model_section(*overrides, tiny=tiny)
    with pytest.raises(ValueError, match=kind):
        check_model(checkpoint.build(section))
    with pytest.raises(ValueError, match=kind):
        export(checkpoint.build(section), BYTES, section, tmp_path / "out", training=Training(7))
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_the_earlier_one_and_nothing_else(
    exported: Any, model_section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    section = model_section("model.depth=1", vocab_size=257)
    replace, calls = os.replace, []

    def fails_once(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OSError, match="No space"):
        export(checkpoint.build(section), BYTES, section, tmp_path / "out", training=Training(7))
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    export(checkpoint.build(section), BYTES, section, tmp_path / "out", training=Training(7))
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.slow  # imports lm_eval
@pytest.mark.filterwarnings("default")  # of that library and of what it imports
def test_the_evaluation_harness_finds_the_bits_per_byte_of_the_model(exported: Any, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    model, _ = exported()
    texts = ["def main():", "é ☃ 𝄞 and more", "x"]
    task = {
        "task": "own",
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"text": text} for text in texts])},
        **{
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
        },
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "out"), "trust_remote_code": True, "dtype": "float32"},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        **{"device": "cpu", "batch_size": 2, "bootstrap_iters": 0},
    )
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[BYTES.end_id, *BYTES.encode(text).tolist()]])
        with torch.inference_mode():
            nats += float(torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum"))
    expected = nats / log(2) / sum(len(text.encode()) for text in texts)
    assert found["results"]["own"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
