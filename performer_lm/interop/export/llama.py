"""Models of this package that are Llama's by another name: their sizes and weights as transformers calls them.

Both rotate the halves of a head against each other, so no row of a weight moves: q, k and v are parts of one matrix
here and three matrices there.

| here | there |
|---|---|
| `embedding`, `head` | `model.embed_tokens`, `lm_head` |
| `performer.norm` | `model.norm` |
| `attention.norm`, `feed_forward.norm` | `input_layernorm`, `post_attention_layernorm` |
| `attention.body.project_in` | `self_attn.q_proj`, `k_proj`, `v_proj` |
| `attention.body.output.project_out` | `self_attn.o_proj` |
| `feed_forward.body.gate`, `project_in`, `project_out` | `mlp.gate_proj`, `up_proj`, `down_proj` |
"""

from collections.abc import Iterator
from typing import Any, Final, cast

from torch import Tensor, nn
from torch.nn import functional as F

from performer_lm.attention.hybrid import HybridAttention
from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.model import PerformerLM
from performer_lm.nn.attention import MultiHeadAttention
from performer_lm.nn.branch import Branch
from performer_lm.nn.feed_forward import FeedForward
from performer_lm.nn.norm import RMSNorm
from performer_lm.nn.positions import Rotary
from performer_lm.nn.reversible import Reversible

ATTENTION_PARTS: Final = {"project_in", "positions", "backend", "output"}  # beside others, attention is no Llama's
BRANCH_PARTS: Final = {"norm", "body", "dropout"}


def is_llama(model: PerformerLM) -> bool:
    """Return True if a model computes what Llama does, whatever it calls its parts."""
    performer = model.performer
    branches = performer.branches
    norms = [performer.norm, *(branch.norm for branch in branches)]
    return (
        performer.causal
        and not isinstance(performer.residual, Reversible)
        and performer.absolute is None
        and len({norm.eps if isinstance(norm, RMSNorm) else None for norm in norms} - {None}) == 1
        and all(isinstance(norm, RMSNorm) for norm in norms)
        and all(_parts_of(branch) == BRANCH_PARTS and branch.gate is None for branch in branches)
        and all(_attends_as_llama(branch.body, dim=performer.dim) for branch in branches[::2])
        and all(_feeds_forward_as_llama(branch.body) for branch in branches[1::2])
        and model.head.bias is None
    )


def _attends_as_llama(body: nn.Module, *, dim: int) -> bool:
    if not isinstance(body, MultiHeadAttention) or _parts_of(body) != ATTENTION_PARTS:
        return False
    backend = body.backend.chosen if isinstance(body.backend, HybridAttention) else body.backend
    positions = body.positions
    return (
        isinstance(backend, CachedAttention)
        and isinstance(positions, Rotary)
        and positions.width == backend.dim_head
        and not positions.interleaved
        and _parts_of(body.output) == {"project_out"}
        and (body.project_in.bias is None) == (body.output.project_out.bias is None)
        and dim % backend.heads == 0
    )


def _feeds_forward_as_llama(body: nn.Module) -> bool:
    return isinstance(body, FeedForward) and body.activation is F.silu and body.gate is not None


def _parts_of(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def describe_llama(model: PerformerLM) -> dict[str, Any]:
    """Return what config.json says of a model that `is_llama`."""
    branches = model.performer.branches
    attention, feed_forward = cast(MultiHeadAttention, branches[0].body), cast(FeedForward, branches[1].body)
    heads, key_heads, _ = attention.heads_each
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": attention.backend.dim_head,
        "intermediate_size": feed_forward.project_in.out_features,
        "hidden_act": "silu",
        "rms_norm_eps": cast(RMSNorm, model.performer.norm).eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": cast(Rotary, attention.positions).base},
        "attention_bias": attention.project_in.bias is not None,
        "mlp_bias": feed_forward.project_in.bias is not None,
    }


def llama_weights(model: PerformerLM) -> dict[str, Tensor]:
    """Return the weights of a model that `is_llama` by Llama's names; the output layer is left out where it is tied."""
    found = {"model.embed_tokens.weight": model.embedding.weight}
    if model.head.weight is not model.embedding.weight:
        found["lm_head.weight"] = model.head.weight
    found["model.norm.weight"] = cast(RMSNorm, model.performer.norm).gain
    branches = model.performer.branches
    for layer, (attention, feed_forward) in enumerate(zip(branches[::2], branches[1::2], strict=True)):
        parts = [*_attention_weights(attention), *_feed_forward_weights(feed_forward)]
        found |= {f"model.layers.{layer}.{name}": value for name, value in parts}
    return found


def _attention_weights(branch: Branch) -> Iterator[tuple[str, Tensor]]:
    body = cast(MultiHeadAttention, branch.body)
    yield "input_layernorm.weight", cast(RMSNorm, branch.norm).gain
    rows = [heads * body.backend.dim_head for heads in body.heads_each]
    for kind, value in body.project_in.named_parameters():
        for name, part in zip("qkv", value.split(rows), strict=True):
            yield f"self_attn.{name}_proj.{kind}", part
    yield from _named("self_attn.o_proj", body.output.project_out)


def _feed_forward_weights(branch: Branch) -> Iterator[tuple[str, Tensor]]:
    body = cast(FeedForward, branch.body)
    yield "post_attention_layernorm.weight", cast(RMSNorm, branch.norm).gain
    yield from _named("mlp.gate_proj", cast(nn.Linear, body.gate))
    yield from _named("mlp.up_proj", body.project_in)
    yield from _named("mlp.down_proj", body.project_out)


def _named(name: str, layer: nn.Linear) -> Iterator[tuple[str, Tensor]]:
    for kind, value in layer.named_parameters():
        yield f"{name}.{kind}", value
