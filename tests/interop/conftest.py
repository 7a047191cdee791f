"""Small random models of transformers, written as folders and as GGUF files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

SIZES: dict[str, Any] = {
    **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5},
    "eos_token_id": 1,
}
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{{ eos_token }}{% endfor %}"
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def transformers() -> Any:
    """Return transformers."""
    module = pytest.importorskip("transformers", reason="needs the extra `hf`")
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="session")
def library() -> Any:
    """Return a byte-level tokenizer of the library with 300 ids, of which <s> and </s> are special."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([f"line {index} says {index * 37 % 101}" for index in range(300)], trainer)
    return found


@pytest.fixture
def build(transformers: Any) -> Callable[..., Any]:
    """Return a function from a kind of model and changes of its config to a model whose every weight is random."""

    def make(kind: str, **changes: Any) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        return model.eval()

    return make


@pytest.fixture
def folder(tmp_path: Path, build: Callable[..., Any], library: Any) -> Write:
    """Return a function that writes a model of `build` as a folder of transformers, with a tokenizer."""

    def write(kind: str = "Llama", *, shard: str = "1GB", **changes: Any) -> Path:
        path = tmp_path / "theirs"
        build(kind, **changes).save_pretrained(path, max_shard_size=shard)
        library.save(str(path / "tokenizer.json"))
        settings = {
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "chat_template": TEMPLATE,
        }
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        return path

    return write


@pytest.fixture
def gguf_file(tmp_path: Path, build: Callable[..., Any], library: Any) -> Write:
    """Return a function that writes a model of `build` as llama.cpp's converter does, its matrices quantised."""
    gguf = pytest.importorskip("gguf", reason="needs the extra `hf`")

    def write(kind: str = "Llama", *, quantised: str = "F32", **changes: Any) -> Path:
        model, path = build(kind, **changes), tmp_path / "theirs.gguf"
        config, writer = model.config, gguf.GGUFWriter(path, kind.lower())
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)
        if kind == "Qwen3":
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        add_vocabulary(writer, library, size=config.vocab_size)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                name.split(".")[-2]
            )
            if kind == "Llama" and heads:
                value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            way = gguf.GGMLQuantizationType[quantised if value.ndim == 2 else "F32"]
            blocks = gguf.quantize(value.contiguous().numpy(), way)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), blocks, raw_dtype=way)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def add_vocabulary(writer: Any, library: Any, *, size: int) -> None:
    """Describe a byte-level tokenizer in a GGUF file, with unused tokens up to the model's size."""
    content = json.loads(library.to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"[PAD{index}]" for index in range(len(tokens), size))])
    writer.add_token_types([3, 3, *([1] * (len(tokens) - 2)), *([5] * (size - len(tokens)))])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
