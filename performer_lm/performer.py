"""The stack of layers: vectors to vectors, causal or bidirectional, perhaps looking at another sequence.

Letters: `b` batch, `n` tokens, `j` tokens of the context.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final, NamedTuple, cast

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from performer_lm.attention.base import AttentionFactory
from performer_lm.attention.favor import Redrawable
from performer_lm.attention.split import SplitAttention
from performer_lm.nn.attention import CrossAttention, MultiHeadAttention
from performer_lm.nn.branch import Body, Branch, BranchState, Context, Plain, Recomputed, Residual, TokenInfo
from performer_lm.nn.initial import initialise
from performer_lm.nn.mixing import TokenShift
from performer_lm.nn.positions import AbsolutePositions, NoAbsolutePositions, Positions
from performer_lm.nn.reversible import Reversible
from performer_lm.ops.checks import check_batch, check_mask, check_per_key
from performer_lm.ranges import Positive, Share, Size, Whole, ranged

SHARP_WIDTH: Final = 32
"""Width from which heads are worth making local: the narrowest that was measured (docs/recipe.md)."""


class PerformerState(NamedTuple):
    """The decoding state of a stack."""

    length: Tensor  # (b,): tokens seen so far, pads not counted
    branches: tuple[BranchState, ...]


@ranged
class Performer(Redrawable):
    """Layers of attention and feed-forward over `(b, n, dim)`, whose heads run any attention backend.

    Args:
        dim: width of the residual stream.
        depth: number of layers.
        heads: query heads per layer.
        attn: factory of the attention backend, called per layer.
        positions: factory of the position scheme of q and k.
        feed_forward: factory of the feed-forward layer, called with dim.
        norm: factory of the norms before each branch, called with dim.
        final_norm: factory of the norm after the last layer; None for that of the branches.
        causal: whether a token sees only itself and those before it.
        cross_attend: whether each layer also attends to a context.
        dim_head: width of a head; None for dim / heads.
        key_heads: key and value heads per layer, a divisor of heads; None for as many as heads.
        local: factory of the local heads' backend; needed where `local_heads` asks for some.
        local_heads: how many of each layer's heads see a local window only: one number, or one per layer; None for a
            quarter of them, in whole key heads, where heads are at least 32 wide (docs/recipe.md).
        convolution: taps of the short causal convolution on q, k, v; 0 for none.
        decay: whether heads fade their keys by a data-dependent `log_decay`; causal only.
        gate: whether each head's output is normalised and gated.
        token_shift: whether part of each branch's input channels is the neighbours' (not for cross-attention).
        qk_norm: bound of the learned temperature of normalised queries and keys; None leaves them as they are.
        head_norm: factory of the norms of each head's queries and keys, called with dim_head; None for none.
        qkv_bias: whether the projections to q, k, v have biases.
        out_bias: whether the projections of the heads' outputs have biases.
        absolute: factory of positions added to the input, called with dim; None adds none.
        rezero: whether each branch is weighed by a learned gate that starts at 0, in place of norms.
        reversible: run two streams, whose backward recovers inputs from outputs: memory constant in depth.
        recompute: compute each branch anew in the backward: memory of one vector per token and branch.
        dropout: share dropped of the input and of the output of each branch.
        embedding_dropout: of the input alone, in place of `dropout`.
        attention_dropout: of the output of attention, in place of `dropout`.

    Raises:
        ValueError: for the first sizes or options that do not fit together.
    """

    def __init__(
        self,
        *,
        dim: Size,
        depth: Annotated[int, Ge(1), Le(4096)],
        heads: Size,
        attn: AttentionFactory,
        positions: Callable[..., Positions],
        feed_forward: Callable[..., Body],
        norm: Callable[..., nn.Module],
        final_norm: Callable[..., nn.Module] | None = None,
        causal: bool = True,
        cross_attend: bool = False,
        dim_head: Size | None = None,
        key_heads: Size | None = None,
        local: AttentionFactory | None = None,
        local_heads: Whole | list[Whole] | None = 0,
        convolution: Whole = 0,
        decay: bool = False,
        gate: bool = False,
        token_shift: bool = False,
        qk_norm: Positive | None = None,
        head_norm: Callable[..., nn.Module] | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        absolute: Callable[..., AbsolutePositions] | None = None,
        rezero: bool = False,
        reversible: bool = False,
        recompute: bool = False,
        dropout: Share = 0.0,
        embedding_dropout: Share | None = None,
        attention_dropout: Share | None = None,
    ) -> None:
        super().__init__()
        if dim_head is None and dim % heads:
            raise ValueError(f"dim ({dim}) must be a multiple of heads ({heads}), or give dim_head")
        if decay and not causal:
            raise ValueError("decay needs a causal model: without an order keys have no age; set decay to false")
        if convolution and not causal:
            raise ValueError("convolution needs a causal model: set convolution to 0 (token_shift looks both ways)")
        if reversible and recompute:
            raise ValueError("reversible already recomputes: set recompute to false")
        if qk_norm is not None and head_norm is not None:
            raise ValueError("qk_norm and head_norm both set the length of queries and keys: set one of them to null")
        width = dim // heads if dim_head is None else dim_head
        if local_heads is None:
            group = heads // (key_heads or heads)
            local_heads = heads // 4 // group * group if width >= SHARP_WIDTH else 0
        local_each = [local_heads] * depth if isinstance(local_heads, int) else list(local_heads)
        if len(local_each) != depth:
            raise ValueError(f"local_heads must be one number or one per layer ({depth}), got {local_each}")
        self.dim, self.causal, self.cross_attend = dim, causal, cross_attend
        self.mixes_neighbours = convolution > 1 or token_shift
        self.residual: Residual = Reversible() if reversible else Recomputed() if recompute else Plain()
        self.dropout = nn.Dropout(dropout if embedding_dropout is None else embedding_dropout)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        shared: dict[str, Any] = {
            "dim": dim,
            "heads": heads,
            "dim_head": width,
            "key_heads": heads if key_heads is None else key_heads,
            "gate": gate,
            "qk_norm": qk_norm,
            "head_norm": head_norm,
            "qkv_bias": qkv_bias,
            "out_bias": out_bias,
        }
        mixing: dict[str, Any] = {"causal": causal, "positions": positions, "convolution": convolution, "decay": decay}

        def branch(body: Body, *, shifts: bool, dropout: float) -> Branch:
            shift = TokenShift(dim, causal=causal) if shifts else None
            return Branch(dim, body=body, norm=norm, shift=shift, dropout=dropout, rezero=rezero)

        self.layers = nn.ModuleList()
        for layer, own_local in enumerate(local_each):
            parts = nn.ModuleDict()
            backend = _with_local_heads(attn, local, heads=heads, local_heads=own_local)
            attention = MultiHeadAttention(**shared, **mixing, attn=backend, layer=layer)
            parts["attention"] = branch(attention, shifts=token_shift, dropout=attention_dropout)
            if cross_attend:
                cross = CrossAttention(**shared, attn=attn, layer=depth + layer)  # with projections of its own
                parts["cross_attention"] = branch(cross, shifts=False, dropout=attention_dropout)
            parts["feed_forward"] = branch(feed_forward(dim), shifts=token_shift, dropout=dropout)
            self.layers.append(parts)
        places = None if absolute is None else absolute(dim)
        self.absolute = None if isinstance(places, NoAbsolutePositions) else places
        self.norm = (final_norm or norm)(dim)
        initialise(self)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Map whole sequences `(b, n, dim)` to `(b, n, dim)`, after the final norm.

        Args:
            x: `(b, n, dim)`.
            mask: `(b, n)` bool or integer, False or 0 at padding.
            segments: `(b, n)` ids of packed documents, which do not see one another.
            context: `(b, j, dim)`, the sequence that cross-attention looks at; given exactly where the stack has it.
            context_mask: `(b, j)` like mask, False at padding of the context.

        Raises:
            ValueError: for a mask or segments of another shape or dtype, a context missing or without use, or more
                tokens than learned positions.
        """
        mask = check_per_key(x[:, None], mask=mask, segments=segments, log_decay=None)
        if self.absolute is not None and self.absolute.max_len is not None and x.shape[1] > self.absolute.max_len:
            raise ValueError(f"{x.shape[1]} tokens are more than the {self.absolute.max_len} learned positions")
        if segments is not None and self.cross_attend:
            raise ValueError("segments: packed documents have one context for all; give each a row of its own")
        info = TokenInfo.of(x, mask, segments, self._context(x.shape[0], context, context_mask))
        x = self.dropout(x if self.absolute is None else self.absolute(x, info.places))
        return self.norm(self.residual.run(self.branches, x, info))

    def init_state(
        self, batch: int, *, max_len: int = 0, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> PerformerState:
        """Return the state of `batch` streams before any token, the context's keys and values in it.

        `max_len` sizes caches and is no limit.

        Raises:
            ValueError: for a bidirectional stack, a context missing or without use, or a context of another batch.
        """
        if not self.causal:
            raise ValueError("a bidirectional model (causal=False) does not decode token by token")
        weight = next(self.parameters())
        seen = self._context(batch, context, context_mask)
        states = [
            branch.init_state(batch, max_len=max_len, device=weight.device, dtype=weight.dtype, context=seen)
            for branch in self.branches
        ]
        return PerformerState(torch.zeros(batch, device=weight.device, dtype=torch.int64), tuple(states))

    def extend(self, x: Tensor, state: PerformerState, *, mask: Tensor | None = None) -> tuple[Tensor, PerformerState]:
        """Append tokens `(b, n, dim)` to the streams: `(b, n, dim)` and the next state.

        Any split of a sequence gives what `forward` gives for the whole, no tokens among them. May consume `state`.
        `mask` `(b, n)`, of the new tokens alone, is False or 0 at the padding that stands left of shorter prompts.

        Raises:
            ValueError: for a mask that is not of these tokens, or a state of another batch.
        """
        check_batch(x, state.length)
        mask = check_mask(mask, x.shape[:2])
        info = TokenInfo.of(x, mask)
        info = info._replace(places=state.length[:, None] + info.places)
        streams = self.residual.open(x if self.absolute is None else self.absolute(x, info.places))
        states = []
        for branch, branch_state in zip(self.branches, state.branches, strict=True):
            given, branch_state = branch.extend(streams[-1], branch_state, info)
            streams = self.residual.add(streams, given)
            states.append(branch_state)
        length = state.length + (x.shape[1] if mask is None else mask.sum(1))
        return self.norm(self.residual.close(streams)), PerformerState(length, tuple(states))

    def count_flops(self, tokens: int, *, context: int = 0) -> int:
        """Return the arithmetic of one sequence's forward: two operations for each multiply-add of a matrix product."""
        return sum(branch.body.count_flops(tokens, context=context) for branch in self.branches)

    @property
    def max_len(self) -> int | None:
        """Return the number of places that positions tell apart; None: no limit."""
        return None if self.absolute is None else self.absolute.max_len

    @property
    def branches(self) -> list[Branch]:
        """Return the branches of all layers in order."""
        found: list[Any] = []
        for parts in self.layers:
            found += cast(nn.ModuleDict, parts).values()
        return found

    def _context(self, batch: int, vectors: Tensor | None, mask: Tensor | None) -> Context | None:
        if vectors is None:
            if mask is not None:
                raise ValueError("a context_mask was given without a context")
            return None
        if not self.cross_attend:
            raise ValueError("a context was given, but the model has no cross-attention (cross_attend=True)")
        if len(vectors) != batch:
            raise ValueError(f"the context must have the batch of the tokens ({batch}), got {len(vectors)}")
        return Context(vectors, check_mask(mask, vectors.shape[:2], name="context_mask"))


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
