"""Models of the Llama shape: their sizes, the section that builds one here, and the places of their weights.

That shape is a stack of causal softmax attention with rotary positions and grouped keys, and of gated feed-forward
layers, each behind an RMS norm: Llama, SmolLM2, Mistral without a window, Qwen2 (biases on q, k, v) and Qwen3 (norms of
each head's queries and keys). Weights go by the names that transformers gives them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Read = Callable[[str], Tensor]


class LlamaShape(NamedTuple):
    """The sizes and options of a model."""

    vocab: int
    dim: int
    depth: int
    heads: int
    key_heads: int
    dim_head: int
    hidden: int  # of the feed-forward layers
    eps: float  # of the norms
    base: float  # of the rotary positions
    activation: str  # of the gates
    tied: bool  # whether the output layer shares the embedding's weight
    qkv_bias: bool
    out_bias: bool
    feed_forward_bias: bool
    head_norms: bool


def describe(shape: LlamaShape) -> dict[str, Any]:
    """Return the plain config section that builds the model, with softmax by the platform's flash kernel."""
    norm = _part("nn.norm.RMSNorm", eps=shape.eps)
    return {
        "_target_": "performer_lm.model.PerformerLM",
        "vocab_size": shape.vocab,
        "dim": shape.dim,
        "depth": shape.depth,
        "heads": shape.heads,
        "dim_head": shape.dim_head,
        "key_heads": shape.key_heads,
        "attn": _part("attention.flash.FlashAttention"),
        "local": _part("attention.local.LocalAttention", window=128),  # for whoever asks for local heads later
        "local_heads": 0,
        "causal": True,
        "positions": _part("nn.positions.Rotary", base=shape.base, width=None, interleaved=False),
        "absolute": _part("nn.positions.NoAbsolutePositions"),
        "feed_forward": _part(
            "nn.feed_forward.FeedForward",
            mult=shape.hidden / shape.dim,
            activation=shape.activation,
            gated=True,
            bias=shape.feed_forward_bias,
            dropout=0.0,
            chunks=1,
        ),
        "norm": norm,
        "final_norm": None,
        "head_norm": norm if shape.head_norms else None,
        "qkv_bias": shape.qkv_bias,
        "out_bias": shape.out_bias,
        "tie_embeddings": shape.tied,
        "head_bias": False,
    }


def check_shapes(shape: LlamaShape, found: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Hold the tensors of a model, by name, against its sizes, before any of them is read.

    Raises:
        ValueError: for the first that is missing, unknown or of another shape.
    """
    layers = {name.split(".")[2] for name in found if name.startswith("model.layers.")}
    if len(layers) != shape.depth:
        raise ValueError(f"{source}: it has weights of {len(layers)} layers, and its config says {shape.depth}")
    wanted = dict(list_weights(shape))
    for name, sizes in wanted.items():
        if name not in found:
            raise ValueError(f"{source}: it has no {name}, which its config asks for")
        if found[name] != sizes:
            raise ValueError(f"{source}: {name} has the shape {found[name]}, and its config says {sizes}")
    for name in found:
        if name not in wanted:
            raise ValueError(f"{source}: it has {name}, which has no counterpart here")


def translate(shape: LlamaShape, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Yield names here and values, in float32, of all weights, which `read` returns by their own names."""
    embedding = read("model.embed_tokens.weight")
    yield "embedding.weight", embedding
    for layer in range(shape.depth):
        there, here = f"model.layers.{layer}", f"performer.layers.{layer}"
        yield f"{here}.attention.norm.gain", read(f"{there}.input_layernorm.weight")
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            qkv = [read(f"{there}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            yield f"{here}.attention.body.project_in.{kind}", torch.cat(qkv)
        if shape.head_norms:
            yield f"{here}.attention.body.query_norm.gain", read(f"{there}.self_attn.q_norm.weight")
            yield f"{here}.attention.body.key_norm.gain", read(f"{there}.self_attn.k_norm.weight")
        for kind in ("weight", "bias") if shape.out_bias else ("weight",):
            yield f"{here}.attention.body.output.project_out.{kind}", read(f"{there}.self_attn.o_proj.{kind}")
        yield f"{here}.feed_forward.norm.gain", read(f"{there}.post_attention_layernorm.weight")
        for kind in ("weight", "bias") if shape.feed_forward_bias else ("weight",):
            for part, name in (("project_in", "up"), ("gate", "gate"), ("project_out", "down")):
                yield f"{here}.feed_forward.body.{part}.{kind}", read(f"{there}.mlp.{name}_proj.{kind}")
    yield "performer.norm.gain", read("model.norm.weight")
    yield "head.weight", embedding if shape.tied else read("lm_head.weight")


def list_weights(shape: LlamaShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of all weights."""
    dim, hidden = shape.dim, shape.hidden
    queries, keys = shape.heads * shape.dim_head, shape.key_heads * shape.dim_head
    matrices = {
        **{"self_attn.q_proj": (queries, dim, shape.qkv_bias), "self_attn.k_proj": (keys, dim, shape.qkv_bias)},
        **{"self_attn.v_proj": (keys, dim, shape.qkv_bias), "self_attn.o_proj": (dim, queries, shape.out_bias)},
        "mlp.gate_proj": (hidden, dim, shape.feed_forward_bias),
        "mlp.up_proj": (hidden, dim, shape.feed_forward_bias),
        "mlp.down_proj": (dim, hidden, shape.feed_forward_bias),
    }
    norms = {"input_layernorm": dim, "post_attention_layernorm": dim}
    if shape.head_norms:
        norms |= {"self_attn.q_norm": shape.dim_head, "self_attn.k_norm": shape.dim_head}
    yield "model.embed_tokens.weight", (shape.vocab, dim)
    for layer in range(shape.depth):
        for name, (rows, columns, biased) in matrices.items():
            yield f"model.layers.{layer}.{name}.weight", (rows, columns)
            if biased:
                yield f"model.layers.{layer}.{name}.bias", (rows,)
        for name, size in norms.items():
            yield f"model.layers.{layer}.{name}.weight", (size,)
    yield "model.norm.weight", (dim,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, dim)


def _part(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"performer_lm.{name}", "_partial_": True, **options}
