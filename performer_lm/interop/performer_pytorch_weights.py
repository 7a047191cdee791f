"""The arguments of performer-pytorch's constructor, and the places here of the weights of its language models."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from performer_lm.model import PerformerLM
from performer_lm.wording import did_you_mean

TABLES = ("pos_emb.emb", "layer_pos_emb.emb")
"""Positions that are computed here."""

Take = Callable[[str], Tensor]


class Arguments(NamedTuple):
    """The arguments of performer-pytorch's `PerformerLM`, by its names and with its defaults."""

    num_tokens: int
    max_seq_len: int
    dim: int
    depth: int
    heads: int
    dim_head: int = 64
    local_attn_heads: int | tuple[int, ...] = 0
    local_window_size: int = 256
    causal: bool = False
    ff_mult: int = 4
    nb_features: int | None = None
    feature_redraw_interval: int | None = 1000
    reversible: bool = False
    ff_chunks: int = 1
    ff_glu: bool = False
    emb_dropout: float = 0.0
    ff_dropout: float = 0.0
    attn_dropout: float = 0.0
    generalized_attention: bool = False
    kernel_fn: Any = "ReLU"
    use_scalenorm: bool = False
    use_rezero: bool = False
    cross_attend: bool = False
    no_projection: bool = False
    tie_embed: bool = False
    rotary_position_emb: bool = True
    axial_position_emb: bool = False
    axial_position_shape: tuple[int, int] | None = None
    auto_check_redraw: bool = True
    qkv_bias: bool = False
    attn_out_bias: bool = False
    shift_tokens: bool = False


def read_arguments(arguments: Mapping[str, Any]) -> Arguments:
    """Return arguments by name, or raise ValueError for one unknown or missing."""
    for name in arguments:
        if name not in Arguments._fields:
            hint = did_you_mean(name, Arguments._fields, cutoff=0.6)
            raise ValueError(f"{name} is no argument of performer-pytorch's PerformerLM{hint}")
    missing = [name for name in Arguments._fields if name not in arguments and name not in Arguments._field_defaults]
    if missing:
        raise ValueError(f"performer-pytorch's PerformerLM needs {', '.join(missing)}")
    return Arguments(**arguments)


def translate(weights: Mapping[str, Tensor], given: Arguments, model: PerformerLM) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and values of all weights."""
    left = {
        name: value
        for name, value in weights.items()
        if name not in TABLES and ".proj_updater." not in name and ".rel_pos." not in name
    }

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"the state dict has no {name}, which the arguments ask for")
        return left.pop(name)

    yield "embedding.weight", take("token_emb.weight")
    yield from _translate_positions(take, given)
    for layer in range(given.depth):
        for place, part in enumerate(("attention", "feed_forward")):
            here = f"performer.net.blocks.{layer}.{'fg'[place]}.net." if given.reversible else ""
            here = here or f"performer.net.layers.{layer}.{place}."
            there = f"performer.layers.{layer}.{part}"
            if given.use_scalenorm:
                yield f"{there}.norm.gain", take(f"{here}g")
            elif given.use_rezero:
                yield f"{there}.gate", take(f"{here}g").reshape(1)
            else:
                yield f"{there}.norm.gain", take(f"{here}norm.weight")
                yield f"{there}.norm.offset", take(f"{here}norm.bias")
            inner = here + "fn." * (1 + given.shift_tokens)  # a norm or gate, a shift
            translate = _translate_attention if part == "attention" else _translate_feed_forward
            yield from translate(take, inner, f"{there}.body", given, layer)
    yield "performer.norm.gain", take("norm.weight")
    yield "performer.norm.offset", take("norm.bias")
    if given.tie_embed:
        yield "head.weight", weights["token_emb.weight"]
    else:
        yield "head.weight", take("to_out.weight")
        yield "head.bias", take("to_out.bias")
    own = model.state_dict()
    yield from ((name, value) for name, value in own.items() if name.endswith("_extra_state"))
    if left:
        raise ValueError(f"the state dict holds {next(iter(left))}, which the arguments do not ask for")


def _translate_positions(take: Take, given: Arguments) -> Iterator[tuple[str, Tensor]]:
    if given.rotary_position_emb:
        return
    if given.axial_position_emb:
        for name, axis in (("rows", 0), ("columns", 1)):
            yield f"performer.absolute.{name}", take(f"pos_emb.weights.{axis}").reshape(-1, given.dim)
    else:
        yield "performer.absolute.vectors", take("pos_emb.emb.weight")


def _translate_attention(
    take: Take, here: str, there: str, given: Arguments, layer: int
) -> Iterator[tuple[str, Tensor]]:
    heads = given.local_attn_heads
    local = heads if isinstance(heads, int) else heads[layer % len(heads)]
    for kind in ("weight", "bias") if given.qkv_bias else ("weight",):
        q, k, v = (take(f"{here}to_{letter}.{kind}") for letter in "qkv")
        q, k = (_interleave_local_heads(x, given, local) for x in (q, k))
        yield f"{there}.project_in.{kind}", torch.cat((q, k, v))
    for kind in ("weight", "bias") if given.attn_out_bias else ("weight",):
        yield f"{there}.output.project_out.{kind}", take(f"{here}to_out.{kind}")
    projection = take(f"{here}fast_attention.projection_matrix")
    if local < given.heads and not given.no_projection:
        backend = f"{there}.backend.everywhere" if local else f"{there}.backend"
        shared = projection.expand(given.heads - local, -1, -1)  # it has one for all heads of a layer
        yield f"{backend}.features.projection", shared


def _interleave_local_heads(rows: Tensor, given: Arguments, local: int) -> Tensor:
    """Reorder the channels of local heads, which it rotates in halves, as ours rotates all: in neighbouring pairs.

    A reordering that queries and keys share changes no score.
    """
    if not (local and given.rotary_position_emb):
        return rows
    split = (given.heads - local) * given.dim_head
    everywhere, nearby = rows[:split], rows[split:]
    nearby = rearrange(nearby, "(h two d) ... -> (h d two) ...", h=local, two=2)
    return torch.cat((everywhere, nearby))


def _translate_feed_forward(
    take: Take, here: str, there: str, given: Arguments, _layer: int
) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        inner = take(f"{here}fn.w1.{kind}")
        if given.ff_glu:
            gate, inner = inner.chunk(2)
            yield f"{there}.gate.{kind}", gate
        yield f"{there}.project_in.{kind}", inner
        yield f"{there}.project_out.{kind}", take(f"{here}fn.w2.{kind}")
