"""The language model: tokens to logits, or tokens and a state to logits and the next state.

Letters: `b` batch, `n` tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from performer_lm.attention.base import Attention, AttentionFactory
from performer_lm.attention.split import SplitAttention
from performer_lm.nn.attention import LayerState, MultiHeadAttention
from performer_lm.nn.mixing import LogDecay, ShortConvolution
from performer_lm.nn.positions import Positions
from performer_lm.nn.residual import PreNormBlock


class ModelState(NamedTuple):
    """What a decoding model carries from token to token, one entry a layer."""

    layers: tuple[LayerState, ...]


class PerformerLM(nn.Module):
    """A causal language model whose heads run any attention backend.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        depth: number of layers.
        heads: query heads per layer.
        dim_head: width of a head; None for dim / heads.
        key_heads: key and value heads per layer, a divisor of heads; None for as many as heads.
        attn: factory of the attention backend, called per layer.
        local: factory of the local heads' backend; needed where `local_heads` asks for some.
        local_heads: how many of each layer's heads see a local window only: one number, or one per layer.
        convolution: taps of the short causal convolution on q, k, v; 0 for none.
        decay: whether heads fade their keys by a data-dependent `log_decay`.
        gate: whether each head's output is normalised and gated.
        positions: factory of the position scheme of q and k.
        feed_forward: factory of the feed-forward layer, called with dim.
        norm: factory of the norms, called with dim.
        dropout: share dropped from the embeddings and from each layer part's output.
        tie_embeddings: whether the output layer shares the embedding's weight.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        depth: int,
        heads: int,
        attn: AttentionFactory,
        positions: Callable[..., Positions],
        feed_forward: Callable[..., nn.Module],
        norm: Callable[..., nn.Module],
        dim_head: int | None = None,
        key_heads: int | None = None,
        local: AttentionFactory | None = None,
        local_heads: int | list[int] = 0,
        convolution: int = 0,
        decay: bool = False,
        gate: bool = False,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(vocab_size=vocab_size, dim=dim, depth=depth, heads=heads)
        if dim_head is None:
            if dim % heads:
                raise ValueError(f"dim ({dim}) must be a multiple of heads ({heads}), or give dim_head")
            dim_head = dim // heads
        locals_each = [local_heads] * depth if isinstance(local_heads, int) else list(local_heads)
        if len(locals_each) != depth:
            raise ValueError(f"local_heads must be one number or one per layer ({depth}), got {len(locals_each)}")
        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            PreNormBlock(
                dim,
                norm=norm,
                feed_forward=feed_forward,
                dropout=dropout,
                attention=MultiHeadAttention(
                    dim=dim,
                    heads=heads,
                    dim_head=dim_head,
                    key_heads=heads if key_heads is None else key_heads,
                    attn=_with_local_heads(attn, local, heads=heads, local_heads=locals_each[layer]),
                    layer=layer,
                    convolution=convolution,
                    decay=decay,
                    gate=gate,
                    positions=positions,
                ),
            )
            for layer in range(depth)
        )
        self.norm = norm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        initialise(self)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Predict each next token: ids `(b, n)` to logits `(b, n, vocab)`.

        Args:
            tokens: `(b, n)` ids.
            mask: `(b, n)` bool, False at padding.
            segments: `(b, n)` ids of packed documents, which do not see one another.
        """
        return self.head(self.hidden(tokens, mask=mask, segments=segments))

    def hidden(self, tokens: Tensor, *, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return what the output layer reads, `(b, n, dim)`: a loss over many tokens need not hold all logits."""
        x = self.dropout(self.embedding(tokens))
        for layer in self._blocks():
            x = layer(x, causal=True, mask=mask, segments=segments)
        return self.norm(x)

    def init_state(self, batch: int, *, max_len: int = 0) -> ModelState:
        """Return the state of `batch` streams before any token; `max_len` sizes caches and is no limit."""
        weight = self.head.weight
        return ModelState(
            tuple(
                layer.init_state(batch, max_len=max_len, device=weight.device, dtype=weight.dtype)
                for layer in self._blocks()
            )
        )

    def extend(
        self, tokens: Tensor, state: ModelState, *, mask: Tensor | None = None, last_only: bool = False
    ) -> tuple[Tensor, ModelState]:
        """Append tokens to the streams: ids `(b, n)` to logits `(b, n, vocab)` and the next state.

        Any split of a sequence gives the logits that `forward` gives for the whole. May consume `state`.

        Args:
            tokens: `(b, n)` ids, for any n.
            state: of `init_state` or of an earlier call.
            mask: `(b, n)` bool, False at the padding that stands left of shorter prompts.
            last_only: return the logits of the last token alone, `(b, 1, vocab)`.
        """
        x = self.embedding(tokens)
        layers = []
        for layer, layer_state in zip(self._blocks(), state.layers, strict=True):
            x, layer_state = layer.extend(x, layer_state, mask=mask)
            layers.append(layer_state)
        if last_only:
            x = x[:, -1:]
        return self.head(self.norm(x)), ModelState(tuple(layers))

    def redraw(self, step: int) -> None:
        """Set every random projection to that of optimizer step `step`; call it between steps only."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.redraw(step)

    def _blocks(self) -> Iterator[PreNormBlock]:
        return cast(Iterator[PreNormBlock], iter(self.layers))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _with_local_heads(
    attn: AttentionFactory, local: AttentionFactory | None, *, heads: int, local_heads: int
) -> AttentionFactory:
    """Return the factory of one layer's backend: all global, all local, or split between the two."""
    if not 0 <= local_heads <= heads:
        raise ValueError(f"local_heads must be within 0..{heads} (heads), got {local_heads}")
    if not local_heads:
        return attn
    if local is None:
        raise ValueError(f"local_heads ({local_heads}) needs `local`, the factory of a local backend")
    return local if local_heads == heads else partial(SplitAttention, attn=attn, local=local, local_heads=local_heads)


def initialise(model: PerformerLM) -> None:
    """Set all initial weights; `normal(s)` has standard deviation s.

    | weight | initial values |
    |---|---|
    | embedding | normal(1): the stream starts at the scale that norms keep; tied to the output layer, normal(0.02) |
    | linear layers that read the stream | normal(1 / sqrt(fan in)) |
    | linear layers that write to it | zeros: every layer starts as the identity |
    | output layer | zeros (tied: the embedding): the first loss is ln(vocab) |
    | convolution | the token itself (1), and a little of those before (normal(0.1)) |
    | decay | weight zeros; bias evenly from `shortest` to `longest` over the heads |
    | norms | gain 1, offset 0 (their constructors) |
    | projections of random features | their backend's own |
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            is_last = name.endswith("project_out") or module is model.head
            nn.init.normal_(module.weight, std=0.0 if is_last else module.in_features**-0.5)
        if isinstance(module, ShortConvolution):
            nn.init.normal_(module.weight, std=0.1)
            nn.init.ones_(module.weight[0])
    for module in model.modules():
        if isinstance(module, LogDecay):
            nn.init.zeros_(module.project.weight)
            with torch.no_grad():
                bias = module.project.bias
                bias.copy_(torch.linspace(module.shortest, module.longest, len(bias), device=bias.device))
    is_tied = model.head.weight is model.embedding.weight
    nn.init.normal_(model.embedding.weight, std=0.02 if is_tied else 1.0)
