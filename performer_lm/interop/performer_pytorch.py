"""Take over language models of performer-pytorch (lucidrains, 1.1.4): its constructor's arguments and its state dict.

    imported = import_language_model(torch.load("model.pt", weights_only=True), num_tokens=256, max_seq_len=1024, ...)
    imported.model         the PerformerLM, ready to evaluate, to train on, to decode with a state
    imported.differences   where and why its logits are not those of the original

Nothing is unpickled here but what the caller loaded, and performer-pytorch itself is not needed. Dropped from a state
dict are the copies of all weights under `proj_updater.instance`, the counter of its redraws, and the tables of fixed
positions, which are computed.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor

from performer_lm import checkpoint
from performer_lm.building import build_model
from performer_lm.interop.performer_pytorch_weights import Arguments, read_arguments, translate
from performer_lm.model import PerformerLM

KERNELS = {
    **{"ReLU": "relu", "GELU": "gelu", "LeakyReLU": "leaky_relu", "Sigmoid": "sigmoid"},
    **{"SiLU": "silu", "Softplus": "softplus", "Tanh": "tanh"},
}
"""Names here of the activations of a generalized kernel, by the names of their modules."""


class Imported(NamedTuple):
    """A model, the plain section that builds it, and its differences from the original."""

    model: PerformerLM
    section: dict[str, Any]
    differences: list[str]


def import_language_model(weights: Mapping[str, Tensor], *, seed: int = 0, **arguments: Any) -> Imported:
    """Build the model that performer-pytorch's arguments describe, with its weights.

    Args:
        weights: the state dict of a performer-pytorch `PerformerLM`; of an `AutoregressiveWrapper`, the part below
            `net.`, which is found by itself.
        seed: of projections yet to be redrawn; those in the state dict are taken over.
        arguments: as the original was called with; `kernel_fn` by name or as a module.

    Raises:
        ValueError: for unknown or missing arguments, what has no counterpart here, or weights that do not fit.
    """
    given = read_arguments(arguments)
    section = describe_language_model(seed=seed, **arguments)
    model = cast(PerformerLM, build_model(section))
    weights = {name.removeprefix("net."): value for name, value in weights.items()}
    checkpoint.load_weights(model, dict(translate(weights, given, model)), source="the state dict")
    return Imported(model.eval(), section, list(find_differences(**arguments)))


def describe_language_model(*, seed: int = 0, **arguments: Any) -> dict[str, Any]:
    """Return the plain config section of the model that performer-pytorch's arguments describe.

    Raises:
        ValueError: for unknown or missing arguments, or what has no counterpart here.
    """
    given = read_arguments(arguments)
    if given.cross_attend:
        raise ValueError("cross_attend: its decoders have two feed-forward layers a block, which have no counterpart")
    layer_norm = _part("nn.norm.LayerNorm")
    norm = _part("nn.norm.ScaleNorm") if given.use_scalenorm else layer_norm
    if given.use_rezero and not given.use_scalenorm:  # with both, its scale norm wins
        norm = _part("nn.norm.NoNorm")
    # its reversible streams are added, ours are averaged: a quarter of eps makes the final norms equal
    final_norm = _part("nn.norm.LayerNorm", eps=2.5e-6) if given.reversible else layer_norm
    local_heads = given.local_attn_heads
    return {
        "_target_": "performer_lm.model.PerformerLM",
        "vocab_size": given.num_tokens,
        "dim": given.dim,
        "depth": given.depth,
        "heads": given.heads,
        "dim_head": given.dim_head,
        "attn": _attention(given, seed),
        "local": _part("attention.local.LocalAttention", window=given.local_window_size),
        "local_heads": local_heads if isinstance(local_heads, int) else list(local_heads),
        "causal": given.causal,
        "token_shift": given.shift_tokens,
        "positions": _part("nn.positions.Rotary", interleaved=True)
        if given.rotary_position_emb
        else _part("nn.positions.NoPositions"),
        "absolute": _absolute(given),
        "feed_forward": _part(
            "nn.feed_forward.FeedForward",
            mult=given.ff_mult,
            activation="gelu",
            gated=given.ff_glu,
            bias=True,
            dropout=given.ff_dropout,
            chunks=given.ff_chunks,
        ),
        "norm": norm,
        "final_norm": final_norm,
        "rezero": given.use_rezero and not given.use_scalenorm,
        "reversible": given.reversible,
        "qkv_bias": given.qkv_bias,
        "out_bias": given.attn_out_bias,
        "embedding_dropout": given.emb_dropout,
        "attention_dropout": given.attn_dropout,
        "tie_embeddings": given.tie_embed,
        "head_bias": not given.tie_embed,
    }


def find_differences(**arguments: Any) -> Iterator[str]:
    """Yield where the logits of the imported model differ from the original's, and why."""
    given = read_arguments(arguments)
    some_local = any(given.local_attn_heads) if isinstance(given.local_attn_heads, tuple) else given.local_attn_heads
    if given.no_projection and not given.causal:
        yield "no_projection: it normalises exp(k) over tokens, for each feature; ours as a causal model does"
    elif given.no_projection:
        yield "no_projection: exp(k) overflows there; ours stays finite at any size"
    elif given.generalized_attention:
        yield "denominators: it adds 1e-6 to those of causal models; ours add nothing"
    else:
        yield "features: it adds 1e-4 to each, which draws attention towards the mean of all values; ours add nothing"
    if given.causal and not (given.no_projection or given.generalized_attention):
        yield "causality: it divides key features by a maximum over the whole sequence, so the future shows; ours not"
    yield "padding: it leaves masked keys in the denominator; for ours they are absent"
    if some_local:
        yield "local heads: a query there sees back one to two windows; ours sees exactly local_window_size keys"
    if some_local and not given.rotary_position_emb:
        yield "local heads: it rotates their queries and keys even without rotary_position_emb; ours does not"
    if given.use_scalenorm and given.use_rezero:
        yield "use_rezero: it is ignored beside use_scalenorm, and so it is here"


def _part(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"performer_lm.{name}", "_partial_": True, **options}


def _attention(given: Arguments, seed: int) -> dict[str, Any]:
    num_features = int(given.dim_head * math.log(given.dim_head)) if given.nb_features is None else given.nb_features
    drawn: dict[str, Any] = {"coupling": "orthogonal", "regularized": False}
    features = _part(
        "attention.feature_maps.SoftmaxFeatures",
        **drawn,
        **dict.fromkeys(("antithetic", "learned", "centred"), False),
        momentum=None,
    )
    redraw_interval = given.feature_redraw_interval
    if given.no_projection:
        features, num_features, redraw_interval = _part("attention.kernel_maps.IdentityFeatures"), given.dim_head, None
    elif given.generalized_attention:
        features = _part(
            "attention.kernel_maps.GeneralizedFeatures",
            **drawn,
            activation=_kernel(given.kernel_fn),
            epsilon=1e-3,
        )
    return _part(
        "attention.favor.FavorAttention",
        features=features,
        num_features=num_features,
        seed=seed,
        redraw_interval=redraw_interval,
        redraw_until=None,
        chunk_size=None,
    )


def _kernel(kernel_fn: Any) -> str:
    name = kernel_fn if isinstance(kernel_fn, str) else type(kernel_fn).__name__
    if name in KERNELS.values():
        return name
    if name not in KERNELS:
        raise ValueError(f"kernel_fn must be one of {', '.join(KERNELS)}, got {name}")
    return KERNELS[name]


def _absolute(given: Arguments) -> dict[str, Any]:
    if given.rotary_position_emb:  # it adds sinusoids as well
        return _part("nn.positions.SinusoidalPositions")
    if given.axial_position_emb:
        shape = given.axial_position_shape or (math.ceil(given.max_seq_len / 64), 64)
        return _part("nn.positions.AxialPositions", shape=list(shape))
    return _part("nn.positions.LearnedPositions", max_len=given.max_seq_len)
