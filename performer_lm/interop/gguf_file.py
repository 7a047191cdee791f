"""A GGUF file of llama.cpp: settings and tokenizer in its metadata, weights as blocks of quantised numbers.

The header is read by transformers, whose reader asks for no more than the file holds; the blocks are undone by `gguf`,
one weight at a time.
"""

import json
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from einops import rearrange
from tokenizers import pre_tokenizers
from torch import Tensor

from performer_lm.data.reading import check_regular
from performer_lm.interop.llama import LlamaShape, check_shapes
from performer_lm.interop.settings import Settings, as_written
from performer_lm.interop.source import Source, build_tokenizer
from performer_lm.wording import first_line, short

KINDS: Final = ("llama", "qwen2", "qwen3")
PLACES: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PARTS: Final = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
    **{"attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
REFUSED: Final = {
    "expert_count": "it is a mixture of experts",
    "attention.sliding_window": "it attends within a sliding window",
    "rope.scaling.factor": "its rotary positions are scaled",
    "rope.scale_linear": "its rotary positions are scaled",
    "split.count": "it is one of several files",
}
# How a byte-level vocabulary parts words, where transformers does not know the name: as GPT-2, numbers apart or not.
SPLITS_DIGITS: Final = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), True),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais"), False),
}
BLOCKS_AT_ONCE: Final = 1 << 22  # numbers of a weight that are undone together


def open_file(path: Path) -> Source:
    """Look at a GGUF file, and return the model in it; no weight is read.

    Raises:
        ValueError: in one line, for a file that is none or is cut short, or a model that cannot be held here.
    """
    check_regular(path)
    try:
        from transformers.integrations.gguf import GgufHeader, get_gguf_tokenizer, read_gguf_metadata
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: a GGUF is read by {error.name}: pip install 'performer-lm[hf]'") from error
    name = str(path)
    try:
        metadata, _ = read_gguf_metadata(name)
        header = GgufHeader.from_file(name)
        _, vocabulary, marks = get_gguf_tokenizer(name)
    except Exception as error:  # whatever the reader raises on broken bytes
        raise ValueError(f"{path} is no GGUF file that is read here, or is cut short ({_told(error)})") from error
    tensors = {_renamed(each.name): each for each in header.tensors}
    shape = _read_shape(metadata, tensors, source=name)
    check_shapes(shape, {key: tuple(each.shape) for key, each in tensors.items()}, source=name)
    size = path.stat().st_size
    for each in header.tensors:
        _check_blocks(each, end=size - header.data_start, source=name)
    tokenizer = _build_tokenizer(header.architecture, vocabulary, marks, size=shape.vocab, source=name)
    permuted = {"q_proj": shape.heads, "k_proj": shape.key_heads} if header.architecture == "llama" else {}
    return Source(name, shape, tokenizer, partial(_read_tensor, path, header.data_start, tensors, permuted))


def _read_shape(metadata: Mapping[str, Any], tensors: Mapping[str, Any], *, source: str) -> LlamaShape:
    kind = metadata["general.architecture"]
    if kind not in KINDS:
        raise ValueError(f"{source}: general.architecture ({short(kind)}) must be one of {', '.join(KINDS)}")
    config = Settings({key.removeprefix(f"{kind}."): value for key, value in metadata.items()}, source=source)
    config.refuse(REFUSED)
    if (scaling := config.get("rope.scaling.type", "none")) != "none" or "rope_freqs.weight" in tensors:
        raise config.refusal(f"its rotary positions are scaled (rope.scaling.type={short(scaling)}), not held here")
    dim, heads = config.count("embedding_length"), config.count("attention.head_count")
    width = config.count("attention.key_length", dim // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if config.count(name, width) != width:
            raise config.refusal(f"{name} ({config.count(name)}) must be the width of a head ({width})")
    embedding = tensors.get("model.embed_tokens.weight")
    return LlamaShape(
        vocab=config.count("vocab_size", embedding.shape[0] if embedding else 1),
        dim=dim,
        depth=config.count("block_count"),
        heads=heads,
        key_heads=config.count("attention.head_count_kv", heads),
        dim_head=width,
        hidden=config.count("feed_forward_length"),
        eps=as_written(config.number("attention.layer_norm_rms_epsilon")),
        base=as_written(config.number("rope.freq_base", 10_000.0)),
        activation="silu",
        tied="lm_head.weight" not in tensors,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
        out_bias="model.layers.0.self_attn.o_proj.bias" in tensors,
        feed_forward_bias="model.layers.0.mlp.up_proj.bias" in tensors,
        head_norms=kind == "qwen3",
    )


def _renamed(name: str) -> str:
    """Return the name in transformers of a tensor; its own, where there is none."""
    place, _, kind = name.rpartition(".")
    if place in PLACES:
        return f"{PLACES[place]}.{kind}"
    first, _, rest = place.partition(".")
    layer, _, part = rest.partition(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}" if first == "blk" and part in PARTS else name


def _check_blocks(tensor: Any, *, end: int, source: str) -> None:
    """Refuse a tensor whose blocks lie beyond the file, or that `gguf` cannot undo."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(tensor.ggml_type)
        numbers, size = GGML_QUANT_SIZES[kind]
        dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except Exception as error:  # NotImplementedError among them
        raise ValueError(
            f"{source}: {tensor.name} is quantised in a way that gguf does not know ({_told(error)})"
        ) from error
    if tensor.shape[-1] % numbers or tensor.offset + prod(tensor.shape) // numbers * size > end:
        raise ValueError(f"{source} is cut short: {tensor.name} lies beyond its end")


def _read_tensor(path: Path, start: int, tensors: Mapping[str, Any], permuted: Mapping[str, int], name: str) -> Tensor:
    """Return a weight in float32, with the rows of queries and keys as rotary positions in halves want them."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    found = tensors[name]
    kind = GGMLQuantizationType(found.ggml_type)
    numbers, size = GGML_QUANT_SIZES[kind]
    row = found.shape[-1] // numbers * size
    rows = prod(found.shape[:-1])
    blocks = np.memmap(path, mode="r", dtype=np.uint8, offset=start + found.offset, shape=(rows, row))
    weight = torch.empty(rows, found.shape[-1])
    step = max(1, BLOCKS_AT_ONCE // found.shape[-1])
    for first in range(0, rows, step):
        part = dequantize(np.array(blocks[first : first + step]), kind)
        weight[first : first + step] = torch.from_numpy(np.asarray(part, dtype=np.float32))
    weight = weight.reshape(found.shape)
    heads = permuted.get(name.split(".")[-2])
    return weight if heads is None else rearrange(weight, "(h d two) ... -> (h two d) ...", h=heads, two=2).contiguous()


def _build_tokenizer(kind: str, vocabulary: dict[str, Any], marks: dict[str, Any], *, size: int, source: str) -> Any:
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = vocabulary.get("pre_tokenizer_type", "default")
    try:
        library, _ = convert_gguf_tokenizer(kind, vocabulary)
    except Exception as error:  # whatever it raises on a vocabulary that is none
        raise ValueError(f"{source}: its tokenizer is not read ({_told(error)})") from error
    if vocabulary.get("tokenizer_type") == "gpt2" and split not in GGUF_PRE_TOKENIZER_SPLITS:
        if split not in SPLITS_DIGITS:
            raise ValueError(
                f"{source}: tokenizer.ggml.pre ({short(split)}) is no way to part words that is known here"
            )
        digits = [pre_tokenizers.Digits(individual_digits=True)] if SPLITS_DIGITS[split] else []
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        library.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    begins = marks.get("add_bos_token", False) is True
    content = json.loads(library.to_str())
    own = len(vocabulary["tokens"])  # transformers adds special tokens that a vocabulary lacks
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < own]
    return build_tokenizer(
        content,
        size=size,
        ends=[vocabulary.get("eos_token_id")],
        begin=vocabulary.get("bos_token_id") if begins else None,
        chat_template=marks.get("chat_template"),
        marks={name: marks.get(name) for name in ("bos_token", "eos_token")},
        source=source,
    )


def _told(error: Exception) -> str:
    return first_line(error)[:160]
